"""Ray Tune: what a trial reports is the history of its run, a stopped trial ends, and a restored one continues."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest

import raykeras as rk
from raykeras.checkpoint.store import Checkpoint
from raykeras.driver.placement import reserved_bundles
from tests.support.models import SCORE, X

EPOCHS, GOOD, BAD = 4, 0.05, 1e-5


class FailOnce(keras.callbacks.Callback):  # type: ignore[misc]
    """Fails in the third epoch, in the first attempt of a trial."""

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = marker

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 2 and not self.marker.exists():
            self.marker.touch()
            raise RuntimeError("the first attempt fails")


def build(learning_rate: float) -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(learning_rate), "mse", metrics=["mae"])
    return model


def plain_history(learning_rate: float) -> dict[str, list[float]]:
    keras.utils.set_random_seed(0)
    options = {"epochs": EPOCHS, "shuffle": False, "verbose": 0}
    return build(learning_rate).fit(X, SCORE, validation_data=(X, SCORE), **options).history  # type: ignore[no-any-return]


def train(config: dict[str, Any], folder: Path, workers: int) -> None:
    from ray import tune

    run = rk.Run(storage=f"{folder}/runs", name=tune.get_context().get_trial_id())
    callbacks = [rk.TuneReportCallback()]
    if config["lr"] == GOOD:
        callbacks.append(FailOnce(folder / "failed"))
    rk.fit(
        functools.partial(build, config["lr"]), X, SCORE, epochs=EPOCHS, shuffle=False, validation_data=(X, SCORE),
        callbacks=callbacks, verbose=0, scale=rk.Scale(workers=workers), run=run,
    )  # fmt: skip


def groups() -> set[str]:
    import ray

    return {key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_trials_match_their_runs(workers: int, tmp_path: Path) -> None:
    from ray import tune

    before = groups()
    bundles = tune.PlacementGroupFactory([{"CPU": 1}] * (1 if workers == 1 else 1 + workers))
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(train, folder=tmp_path, workers=workers), bundles),
        param_space={"lr": tune.grid_search([GOOD, BAD])},
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            scheduler=tune.schedulers.ASHAScheduler(grace_period=1, reduction_factor=2, max_t=EPOCHS),
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str(tmp_path), name="tune", failure_config=tune.FailureConfig(max_failures=1), verbose=0
        ),
    )
    results = tuner.fit()
    assert not results.errors
    by_rate = {result.config["lr"]: result for result in results}
    for result in by_rate.values():
        check_reports(result, tmp_path)
    best = results.get_best_result()
    assert best.config["lr"] == GOOD
    for name, values in plain_history(GOOD).items():
        assert reports(best)[name].tolist() == pytest.approx(values)
    listed = {info.name: info for info in rk.runs(f"{tmp_path}/runs")}
    good, bad = (listed[by_rate[rate].metrics["trial_id"]] for rate in (GOOD, BAD))
    assert (good.status, good.epochs) == ("completed", EPOCHS)
    assert (bad.status, bad.epochs) == ("interrupted", 1)
    assert groups() == before


def test_callback_needs_a_trial(recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(rk.OptionError, match="must be created in the function of a Ray Tune trial") as raised:
        rk.TuneReportCallback()
    assert all("raykeras/driver" not in str(entry.path) for entry in raised.traceback)
    assert not [warning for warning in recwarn if "Tuner" in str(warning.message)]


def test_workers_use_bundles_of_the_placement_group() -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=1)
    def bundles(workers: tuple[int, ...]) -> list[Any]:
        return [reserved_bundles(rk.Scale(workers=number), 1.0) for number in workers]

    group = ray.util.placement_group([{"CPU": 1}] * 3)
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    try:
        one, two = ray.get(bundles.options(scheduling_strategy=inside).remote((1, 2)))
        assert (one.indices, two.indices) == ((1,), (1, 2)) and two.group == group
        with pytest.raises(rk.ResourceError, match=r"2 fit beside this process.*PlacementGroupFactory\(\[\{'CPU': 1.0"):
            ray.get(bundles.options(scheduling_strategy=inside).remote((3,)))
        outside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=False)
        assert ray.get(bundles.options(scheduling_strategy=outside).remote((2,))) == [None]
    finally:
        ray.util.remove_placement_group(group)
    assert reserved_bundles(rk.Scale(workers=2), 1.0) is None  # a driver is in no group


def reports(result: Any) -> pd.DataFrame:
    """Return what a trial reported, by epoch; `metrics_dataframe` may lack the epochs before a restart."""
    return pd.read_csv(f"{result.path}/progress.csv")


def check_reports(result: Any, folder: Path) -> None:
    """Check that the trial reported each epoch of its run once, and handed over the last checkpoint."""
    reported = reports(result)
    run = rk.open_run(f"{folder}/runs/{result.metrics['trial_id']}")
    assert reported["training_iteration"].tolist() == [epoch + 1 for epoch in run.epoch]
    for name, values in run.history.items():
        assert reported[name].tolist() == values
    handed_over, saved = Checkpoint(result.checkpoint.path).load_model(), run.checkpoints[-1].load_model()
    for one, other in zip(handed_over.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
