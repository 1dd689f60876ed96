"""Imported once by the fork server: what a process of a test would otherwise import again."""

from raykeras.noise import import_tensorflow, quiet

quiet()
import_tensorflow()

import keras  # noqa: E402, F401
import ray.train.v2.api.data_parallel_trainer  # noqa: E402, F401
import tf_keras  # noqa: E402, F401

import raykeras.driver  # noqa: E402
import raykeras.worker  # noqa: E402, F401
