"""Validation of `Scale` and `Run`."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest

from raykeras import OptionError, Run, Scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers` must be a whole number of at least 1; got 0"),
        ({"workers": True}, "`workers`"),
        ({"workers": 1.5}, "`workers`"),
        ({"workers": (1, 2, 3)}, "a number, or a pair"),
        ({"workers": (3, 2)}, "`workers` must be a whole number of at least 3; got 2"),
        ({"workers": (0, 2)}, "`min_workers` must be a whole number of at least 1"),
        ({"gpus_per_worker": -1}, "`gpus_per_worker` must be a whole number of at least 0"),
        ({"replicas_per_worker": 0}, "`replicas_per_worker`"),
        ({"cpus_per_worker": 0}, "`cpus_per_worker` must be above 0"),
        ({"workers": 2, "idle_timeout_s": -1}, "`idle_timeout_s` must be a number of seconds of at least 0; got -1"),
        ({"workers": 2, "placement": "near"}, '`placement` must be "pack" or "spread"; got \'near\''),
        ({"workers": 2, "resources_per_worker": {"GPU": 1}}, "Pass `gpus_per_worker`"),
        ({"workers": 2, "resources_per_worker": {"memory": 0}}, "must be above 0; got 0 for 'memory'"),
        ({"workers": 2, "accelerator_type": "A100"}, "got 'A100' without GPUs"),
        ({"workers": (1, 2), "label_selector": {"a": "b"}}, "needs a fixed number of workers"),
        ({"placement": "spread"}, "one worker without GPUs runs in this process"),
        ({"gpus_per_worker": 4, "replicas_per_worker": 2}, "every GPU holds one replica; got 2 and 4"),
    ],
)
def test_invalid_scale_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Scale(**options)


def test_worker_reserves_its_resources() -> None:
    scale = Scale(workers=2, gpus_per_worker=4, accelerator_type="A100", resources_per_worker={"memory": 1e9})
    assert scale.bundle(0.5) == {"CPU": 0.5, "GPU": 4.0, "memory": 1e9, "accelerator_type:A100": 0.001}
    assert Scale(workers=2).bundle(1.0) == {"CPU": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"storage": ""}, "`storage`"),
        ({"name": "a/b"}, "`name` must be one folder name"),
        ({"name": "../up"}, "`name` must be one folder name"),
        ({"seed": -1}, "`seed`"),
        ({"seed": 2**32}, "below 2"),
        ({"checkpoint_every": "day"}, "`checkpoint_every`"),
        ({"checkpoint_every": 0}, "`checkpoint_every`"),
        ({"checkpoint_every": "0s"}, "`checkpoint_every`"),
        ({"resume": True}, "`resume` must be"),
        ({"max_failures": -1}, "`max_failures`"),
        ({"hang_timeout_s": 0}, "`hang_timeout_s` must be above 0"),
        ({"keep": 0}, "`keep`"),
    ],
)
def test_invalid_run_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Run(**options)


def test_every_gpu_is_a_replica() -> None:
    assert Scale(workers=3, gpus_per_worker=4).total_replicas == 12
    assert Scale(workers=3, replicas_per_worker=2).total_replicas == 6


def test_options_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scale().workers = 2  # type: ignore[misc]


def test_checkpoint_interval_is_parsed_from_text() -> None:
    every = [Run(checkpoint_every=text).checkpoint_every for text in ("90s", "1.5 min", "2h")]
    assert every == [timedelta(seconds=90), timedelta(seconds=90), timedelta(hours=2)]


def test_worker_range_has_minimum_and_maximum() -> None:
    scale = Scale(workers=(2, 8), gpus_per_worker=4)
    assert (scale.min_workers, scale.workers, scale.total_replicas) == (2, 8, 32)
    assert scale.with_workers(3) == Scale(workers=3, gpus_per_worker=4)
    assert Scale(workers=(2, 2)).min_workers == 2
