"""`Scale` and `Run` refuse what cannot be, and say why."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from raykeras import OptionError, Run, Scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers` must be a whole number of at least 1; got 0"),
        ({"workers": True}, "`workers`"),
        ({"workers": 1.5}, "`workers`"),
        ({"gpus_per_worker": -1}, "`gpus_per_worker` must be a whole number of at least 0"),
        ({"replicas_per_worker": 0}, "`replicas_per_worker`"),
        ({"cpus_per_worker": 0}, "`cpus_per_worker` must be above 0"),
        ({"gpus_per_worker": 4, "replicas_per_worker": 2}, "every GPU holds one replica; got 2 and 4"),
    ],
)
def test_scales_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Scale(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": ""}, "`storage`"),
        ({"name": "a/b"}, "`name` must be one folder name"),
        ({"name": "../up"}, "`name` must be one folder name"),
        ({"seed": -1}, "`seed`"),
        ({"seed": 2**32}, "below 2"),
        ({"checkpoint_every": "day"}, "`checkpoint_every`"),
        ({"keep": 0}, "`keep`"),
    ],
)
def test_runs_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Run(**options)


def test_every_gpu_is_a_replica() -> None:
    assert Scale(workers=3, gpus_per_worker=4).num_replicas == 12
    assert Scale(workers=3, replicas_per_worker=2).num_replicas == 6


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scale().workers = 2  # type: ignore[misc]
