"""Tested versions of other packages, and access to their private names.

A module of `compat` declares each private name that it uses as a `PrivateName`. `tests/compat` resolves all of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raykeras.compat.patch import patched, patched_method
from raykeras.core.errors import RaykerasError

TESTED: Mapping[str, str] = {
    "ray": ">=2.52,<2.61",
    "tensorflow": ">=2.19,<2.22",
    "keras": ">=3.12,<3.16",
    "tf_keras": ">=2.19,<2.22",
    "pyarrow": ">=18,<27",
}
"""Version ranges that the tests pass with, as `pyproject.toml` states them."""


def is_tested(package: str, version: str) -> bool:
    """Return whether a version of a package is in the range of `TESTED`."""
    oldest, end = _bounds(package)
    return oldest <= _release(version) < end


def is_older(package: str, version: str) -> bool:
    """Return whether a version of a package is older than the range of `TESTED`."""
    return _release(version) < _bounds(package)[0]


def check_installed() -> None:
    """Check the installed packages that every call uses, without importing them.

    One that is newer than the tested range is a warning, once in a process: if it lacks a private name, that name's own
    warning or error follows. A newer Keras must pass `raykeras.distribute.self_check` on several replicas instead.

    Raises:
        RaykerasError: A package is older than the tested range.
    """
    for package in ("ray", "tensorflow", "keras", "pyarrow"):
        refuse_older(package)
        version = installed_version(package)
        if package != "keras" and version is not None and not is_tested(package, version):
            warn_once(
                f"raykeras is tested with {package}{TESTED[package]}; got {package} {version}. If something fails, "
                f"install `{package}{TESTED[package]}`.",
                stacklevel=5,  # the caller of a public function, which has a decorator
            )


def refuse_older(package: str) -> None:
    """Refuse an installed package that is older than the tested range.

    Raises:
        RaykerasError: It is older.
    """
    version = installed_version(package)
    if version is not None and is_older(package, version):
        raise RaykerasError(
            f"raykeras needs {package}{TESTED[package]}; got {package} {version}, which is older. Install "
            f"`{package}{TESTED[package]}`."
        )


@functools.cache
def installed_version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed under this name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # such as TensorFlow as `tensorflow-cpu`
        return None


def _bounds(package: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first release in the tested range, and the first one after it."""
    oldest, end = TESTED[package].split(",")
    return _release(oldest.removeprefix(">=")), _release(end.removeprefix("<"))


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without a suffix such as "rc1"."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


@dataclass(frozen=True)
class PrivateName:
    """A private name of another package.

    Attributes:
        path: "module:attribute", or "module:Class.attribute".
        purpose: What raykeras needs the name for, as in "to {purpose}".
        fallback: What happens without the name, as a clause. None if raykeras raises an error without it.
        parameters: Names of the first parameters that raykeras passes or replaces; None if it is not called.
        since: First release that has the name, if raykeras does not need it with earlier ones; otherwise None.
    """

    path: str
    purpose: str
    fallback: str | None = None
    parameters: tuple[str, ...] | None = None
    since: str | None = None

    @property
    def is_expected(self) -> bool:
        """Whether the name should exist in the installed version of the package."""
        version = installed_version(self.package)
        return self.since is None or version is None or _release(version) >= _release(self.since)

    @property
    def package(self) -> str:
        return self.path.split(".")[0].split(":")[0]

    @property
    def attribute(self) -> str:
        """The last part of the path."""
        return re.split("[.:]", self.path)[-1]

    def get(self) -> Any:
        """Return the object.

        Raises:
            RaykerasError: The installed version of the package does not have it.
        """
        try:
            return self._resolve()
        except (ImportError, AttributeError):
            raise self._error() from None

    def find(self) -> Any:
        """Return the object, or None with one warning per process if the package should have it and does not."""
        try:
            return self._resolve()
        except (ImportError, AttributeError):
            if self.is_expected:
                warn_once(f"{self._missing()} Without it, {self.fallback}. Tested: {TESTED[self.package]}.")
            return None

    def of(self, instance: Any) -> Any:
        """Return the attribute of an instance of the class.

        Raises:
            RaykerasError: The instance does not have it.
        """
        try:
            return getattr(instance, self.attribute)
        except AttributeError:
            raise self._error() from None

    @contextlib.contextmanager
    def replaced(self, value: Any) -> Iterator[None]:
        """Replace the object in its module or class while the block runs.

        Raises:
            RaykerasError: The installed version of the package does not have it.
        """
        self.get()
        with patched(self._owner(), self.attribute, value):
            yield

    @contextlib.contextmanager
    def replaced_on(self, instance: Any, value: Any) -> Iterator[None]:
        """Replace the method of one instance while the block runs.

        Raises:
            RaykerasError: The instance does not have it.
        """
        self.of(instance)
        with patched_method(instance, self.attribute, value):
            yield

    def _resolve(self) -> Any:
        return getattr(self._owner(), self.attribute)

    def _owner(self) -> Any:
        """Return the module or class that has the attribute."""
        module, _, attributes = self.path.partition(":")
        owner: Any = importlib.import_module(module)
        for attribute in attributes.split(".")[:-1]:
            owner = getattr(owner, attribute)
        return owner

    def _error(self) -> RaykerasError:
        return RaykerasError(f"{self._missing()} Install `{self.package}{TESTED[self.package]}`.")

    def _missing(self) -> str:
        version = installed_version(self.package) or "as installed"
        return f"raykeras needs `{self.path}` to {self.purpose}; {self.package} {version} does not have it."


@functools.cache
def warn_once(message: str, stacklevel: int = 4) -> None:
    """Warn, unless this process has warned of the same."""
    warnings.warn(message, stacklevel=stacklevel)
