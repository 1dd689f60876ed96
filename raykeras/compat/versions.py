"""Tested versions of other packages, and access to their private names.

A module of `compat` declares each private name that it uses as a `PrivateName`. `tests/compat` resolves all of them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raykeras.core.errors import RaykerasError

TESTED: Mapping[str, str] = {
    "ray": ">=2.60,<2.61",
    "tensorflow": ">=2.21,<2.22",
    "keras": ">=3.12,<3.16",
    "tf_keras": ">=2.21,<2.22",
}
"""Version ranges that the tests pass with, as `pyproject.toml` states them."""


@dataclass(frozen=True)
class PrivateName:
    """A private name of another package.

    Attributes:
        path: "module:attribute", or "module:Class.attribute".
        purpose: What raykeras needs the name for, as in "to {purpose}".
        fallback: What happens without the name, as a clause. None if raykeras refuses to go on without it.
        parameters: Names of the first parameters that raykeras passes or replaces; None if it is not called.
    """

    path: str
    purpose: str
    fallback: str | None = None
    parameters: tuple[str, ...] | None = None

    @property
    def package(self) -> str:
        return self.path.split(".")[0].split(":")[0]

    def get(self) -> Any:
        """Return the object.

        Raises:
            RaykerasError: The installed version of the package does not have it.
        """
        try:
            return self._resolve()
        except (ImportError, AttributeError):
            raise RaykerasError(f"{self._missing()} Install `{self.package}{TESTED[self.package]}`.") from None

    def find(self) -> Any:
        """Return the object, or None with one warning per process if the package does not have it."""
        try:
            return self._resolve()
        except (ImportError, AttributeError):
            _warn_once(f"{self._missing()} Without it, {self.fallback}. Tested: {TESTED[self.package]}.")
            return None

    def _resolve(self) -> Any:
        module, _, attributes = self.path.partition(":")
        value: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            value = getattr(value, attribute)
        return value

    def _missing(self) -> str:
        version = importlib.metadata.version(self.package)
        return f"raykeras needs `{self.path}` to {self.purpose}; {self.package} {version} does not have it."


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
