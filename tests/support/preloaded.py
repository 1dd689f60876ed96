"""The modules that the fork server imports once for all forked processes."""

from raykeras.compat.quiet import import_tensorflow, quiet

quiet()
import_tensorflow()

import keras  # noqa: E402, F401
import ray.train.v2.api.data_parallel_trainer  # noqa: E402, F401
import tf_keras  # noqa: E402, F401

import raykeras.driver.fit  # noqa: E402
import raykeras.worker.train  # noqa: E402, F401
