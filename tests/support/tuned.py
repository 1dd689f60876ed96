"""A Ray Tune experiment of one trial, whose processes are killed in the third epoch, and which is then restored.

    python -m tests.support.tuned FOLDER

starts the experiment, or restores it, and writes what the trial reported to `reported.csv`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import raykeras as rk
from tests.support.resuming import EPOCHS, VALIDATION, X, Y, build

OPTIONS: dict[str, Any] = {"batch_size": 16, "epochs": EPOCHS, "verbose": 0, "validation_data": VALIDATION}


def train(config: dict[str, Any], folder: str, driver: int) -> None:
    import keras
    from ray import tune

    class Kill(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            marker = Path(folder, "killed")
            if int(self.model.optimizer.iterations) == 13 and not marker.exists():
                marker.touch()
                while not list(Path(folder).glob("runs/*/checkpoints/epoch-000002-step-000000002/train_state.json")):
                    time.sleep(0.01)
                os.kill(driver, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    run = rk.Run(storage=f"{folder}/runs", name=tune.get_context().get_trial_id(), checkpoint_every=2)
    rk.fit(build, X, Y, callbacks=[rk.TuneReportCallback(), Kill()], run=run, **OPTIONS)


def main(folder: str) -> None:
    import ray
    from ray import tune

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    trainable = tune.with_parameters(train, folder=folder, driver=os.getpid())
    experiment = f"{folder}/experiment"
    if tune.Tuner.can_restore(experiment):
        tuner = tune.Tuner.restore(experiment, trainable)
    else:
        tuner = tune.Tuner(trainable, run_config=tune.RunConfig(storage_path=folder, name="experiment", verbose=0))
    (result,) = tuner.fit()
    result.metrics_dataframe.to_csv(f"{folder}/reported.csv", index=False)


if __name__ == "__main__":
    main(sys.argv[1])
