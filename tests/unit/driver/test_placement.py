"""Which bundles of an existing placement group the workers use."""

from __future__ import annotations

import pytest

from raykeras.driver.placement import assign

CPU, GPU = {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("bundles", "worker", "expected"),
    [
        ([{"CPU": 0.0}, CPU, CPU], CPU, [1, 2]),  # the process holds the first bundle
        ([CPU, CPU, CPU], CPU, [0, 1]),  # a process that holds nothing
        ([{"CPU": 2.0}], CPU, [0, 0]),
        ([{"CPU": 0.0}, CPU, CPU], {"CPU": 0.5}, [1, 2]),  # spread
        ([CPU, GPU, GPU], {"CPU": 1.0, "GPU": 1.0}, [1, 2]),
        ([CPU, CPU], {"CPU": 1.0, "GPU": 0.0}, [0, 1]),
        ([{"CPU": 0.0}, CPU], CPU, [1]),  # not enough
        ([{"CPU": 0.0}], CPU, []),
        ([{"memory": 1e9}], CPU, []),
    ],
)
def test_workers_use_free_bundles(
    bundles: list[dict[str, float]], worker: dict[str, float], expected: list[int]
) -> None:
    assert assign(bundles, worker, 2) == expected
