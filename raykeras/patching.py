"""Other packages' names, replaced for a while.

Enters: a module or object and a name. Leaves: it, as it was, once the `with` block is over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, `target.name` is `value`."""
    original = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)


@contextlib.contextmanager
def replaced_method(target: Any, name: str, value: Any) -> Iterator[None]:
    """Within it, the instance `target` has `value` for its method `name`; past any `__setattr__` of its class."""
    attributes = vars(target)
    own = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(own)


class Altered:
    """A module, or an object, with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
