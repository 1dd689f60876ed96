"""A pytest plugin that redirects calls of `fit`, `evaluate` and `predict` of Keras models to raykeras.

    python -m pytest -p tests.compat.redirect --through-raykeras --pyargs keras.src.trainers.trainer_test

Only the outermost call is redirected; calls that raykeras, a callback or Keras makes within it go to Keras. Without
`--through-raykeras` nothing is redirected, so both runs have the same devices and plugins.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import os
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_CALLS = {"fit", "evaluate", "predict", "run_layer_test", "run_training_check"}
_EXIT_STATUS = pytest.StashKey[int]()
_UNUSED = {"predict": ("verbose",)}  # which raykeras does not have


class Redirection:
    """Redirects calls to raykeras.

    Attributes:
        scale: Options of `rk.Scale`.
        is_legacy: Whether to redirect tf_keras instead of Keras 3.
        storage: Folder of the runs.
    """

    def __init__(self, scale: dict[str, int], is_legacy: bool) -> None:
        self.scale, self.is_legacy = scale, is_legacy
        self.storage = tempfile.mkdtemp(prefix="keras-suite-")
        self._is_inside = False

    def install(self) -> None:
        if self.is_legacy:
            from tf_keras.src.engine import training

            trainer: Any = training.Model
        else:
            from keras.src.backend.tensorflow.trainer import TensorFlowTrainer as trainer
            from keras.src.saving import saving_api

            # some tests train a Trainer and Layer that is not a Model; `save` is all that raykeras needs in addition
            trainer.save = lambda self, path, **options: saving_api.save_model(self, path, **options)
        for name in ("fit", "evaluate", "predict"):
            setattr(trainer, name, self._redirected(name, getattr(trainer, name)))

    def _redirected(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def method(model: Any, *args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return original(model, *args, **kwargs)
            self._is_inside = True
            try:
                return self._call(name, signature, model, args, kwargs)
            finally:
                self._is_inside = False

        return method

    def _call(self, name: str, signature: inspect.Signature, model: Any, args: Any, kwargs: Any) -> Any:
        import raykeras as rk

        given = dict(signature.bind(model, *args, **kwargs).arguments)  # by name, as raykeras requires
        given.pop("self", None)
        given |= given.pop("kwargs", {})
        for unused in _UNUSED.get(name, ()):
            given.pop(unused, None)
        if self.is_legacy:  # options of Keras 2's generators
            for unused in ("max_queue_size", "workers", "use_multiprocessing"):
                given.pop(unused, None)
        x, scale = given.pop("x", None), rk.Scale(**self.scale)
        if name == "fit":
            run = rk.Run(storage=tempfile.mkdtemp(dir=self.storage))
            return self._history(rk.fit(model, x, run=run, scale=scale, **given), model)
        if name == "evaluate":
            return rk.evaluate(model, x, scale=scale, **{"return_dict": False, **given})
        return rk.predict(model, x, scale=scale, **given)

    def _history(self, result: Any, model: Any) -> Any:
        """Return what Keras' `fit` returns."""
        if self.is_legacy:
            from tf_keras.callbacks import History
        else:
            from keras.callbacks import History
        history = History()
        history.history, history.epoch, history.params = dict(result.history), list(result.epoch), dict(result.params)
        with contextlib.suppress(Exception):
            history.set_model(model)
        return history


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("raykeras")
    group.addoption("--through-raykeras", action="store_true", help="redirect the calls")
    group.addoption("--replicas", type=int, default=1, help="replicas of each worker; also without redirection")
    group.addoption("--workers", type=int, default=1)
    group.addoption("--legacy", action="store_true", help="tf_keras instead of Keras 3")
    group.addoption("--sample", type=int, metavar="N", help="only N tests, evenly spread")


def pytest_configure(config: pytest.Config) -> None:
    config.add_cleanup(functools.partial(_exit, config))  # the last of all cleanups
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: defined in Keras' own conftest")
    if "conftest" not in sys.modules:  # some tests import it
        module: Any = types.ModuleType("conftest")
        module.skip_if_backend = lambda name, reason: pytest.mark.skipif(name == "tensorflow", reason=reason)
        sys.modules["conftest"] = module
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import tensorflow as tf

    replicas = config.getoption("--replicas")
    if replicas > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * replicas
        )
    if config.getoption("--through-raykeras"):
        scale = {"replicas_per_worker": replicas, "workers": config.getoption("--workers")}
        redirection = Redirection(scale, config.getoption("--legacy"))
        config.add_cleanup(lambda: shutil.rmtree(redirection.storage, ignore_errors=True))
        redirection.install()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_EXIT_STATUS] = exitstatus


def _exit(config: pytest.Config) -> None:
    """End the process, although a test that failed may have left a thread that waits forever."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    sys.stdout.flush()
    os._exit(config.stash.get(_EXIT_STATUS, 1))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that call `fit`, `evaluate` or `predict`."""
    kept = [item for item in items if _calls(item)]
    if (num := config.getoption("--sample")) and num < len(kept):
        kept = [kept[i * len(kept) // num] for i in range(num)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in items:
        if "multi_device" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs several JAX devices"))


def _calls(item: pytest.Item) -> bool:
    # absl appends to the function's name in parameterized tests
    return any(re.fullmatch(re.escape(name) + r"(\d+|_.*|\[.*|\s.*)*", item.name) for name in _calling(str(item.path)))


@functools.cache
def _calling(path: str) -> set[str]:
    """Return the functions of a file that call one of `_CALLS`, directly or through others of the file."""
    called: dict[str, set[str]] = {}
    for function in _functions(ast.parse(Path(path).read_text())):
        inner = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
        names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in inner}
        called.setdefault(function.name, set()).update(names)
    found = set(_CALLS)
    while more := {name for name, names in called.items() if names & found} - found:
        found |= more
    return found & set(called)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
