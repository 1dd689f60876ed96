"""The Optuna and KerasTuner examples of the documentation, on one and on two workers."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import keras
import pytest

import raykeras as rk
from tests.support.markdown import ROOT, python_blocks
from tests.support.models import SCORE, TWO, X

EPOCHS, GOOD, BAD = 3, 0.05, 1e-5
OPTIONS: dict[str, Any] = {
    "epochs": EPOCHS,
    "shuffle": False,
    "verbose": 0,
    "validation_data": (X, SCORE),
}
SCALES = pytest.mark.parametrize("scale", [rk.Scale(), TWO], ids=["one worker", "two workers"])

pytestmark = pytest.mark.usefixtures("two_workers")


def example(name: str, storage: Path) -> Any:
    """Return a class of the page on tuning."""
    names: dict[str, Any] = {"rk": rk, "STORAGE": str(storage)}
    for block in python_blocks(ROOT / "docs" / "guides" / "tuning.md"):
        parsed = ast.parse(block.code)
        if any(isinstance(node, ast.ClassDef) and node.name == name for node in parsed.body):
            parsed.body = [node for node in parsed.body if isinstance(node, ast.Import | ast.ClassDef)]
            exec(compile(parsed, "tuning.md", "exec"), names)
    return names[name]


def build(learning_rate: float) -> Any:
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(keras.optimizers.Adam(learning_rate), "mse", metrics=["mae"])
    return model


@functools.cache
def plain_history(learning_rate: float) -> dict[str, list[float]]:
    return build(learning_rate).fit(X, SCORE, **OPTIONS).history  # type: ignore[no-any-return]


@SCALES
def test_optuna_prunes_trials(scale: rk.Scale, tmp_path: Path) -> None:
    import optuna

    prune = example("Prune", tmp_path)
    histories = []

    def objective(trial: Any) -> float:
        model = functools.partial(build, trial.suggest_float("learning_rate", BAD, GOOD))
        run = rk.Run(storage=str(tmp_path), name=f"trial-{trial.number}")
        result = rk.fit(model, X, SCORE, callbacks=[prune(trial)], scale=scale, run=run, **OPTIONS)
        histories.append(result.history)
        return result.history["val_loss"][-1]  # type: ignore[no-any-return]

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    for rate in (GOOD, BAD):
        study.enqueue_trial({"learning_rate": rate})
    study.optimize(objective, n_trials=2)

    good, bad = study.trials
    assert (good.state, bad.state) == (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    (history,) = histories
    assert history == {name: pytest.approx(values) for name, values in plain_history(GOOD).items()}
    assert good.intermediate_values == dict(enumerate(history["val_loss"]))
    assert bad.intermediate_values == {0: rk.open_run(f"{tmp_path}/trial-1").history["val_loss"][0]}
    assert [(info.status, info.epochs) for info in rk.runs(str(tmp_path))] == [("completed", 3), ("interrupted", 1)]


@pytest.mark.parametrize(
    "scale", [rk.Scale(), pytest.param(TWO, marks=pytest.mark.exhaustive)], ids=["one worker", "two workers"]
)
def test_keras_tuner_finds_the_best_trial(scale: rk.Scale, tmp_path: Path) -> None:
    tuner = example("Tuner", tmp_path)(
        lambda hp: build(hp.Choice("learning_rate", [GOOD, BAD])),
        objective="val_loss",
        max_trials=2,
        directory=str(tmp_path),
        project_name="project",
    )
    tuner.search(X, SCORE, scale=scale, **OPTIONS)

    best, worst = tuner.oracle.get_best_trials(2)
    assert [trial.hyperparameters["learning_rate"] for trial in (best, worst)] == [GOOD, BAD]
    for trial in (best, worst):
        history = rk.open_run(f"{tmp_path}/keras_tuner/trial-{trial.trial_id}").history
        expected = plain_history(trial.hyperparameters["learning_rate"])
        assert history == {name: pytest.approx(values) for name, values in expected.items()}
        assert trial.score == min(history["val_loss"])
    (model,) = tuner.get_best_models()
    assert model.evaluate(X, SCORE, verbose=0)[0] == pytest.approx(best.score)
