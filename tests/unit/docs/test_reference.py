"""Every public name has a place in the reference, and a docstring that describes what it takes, returns and raises."""

from __future__ import annotations

import ast
import collections
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import raykeras as rk

REFERENCE = Path(__file__).parents[3] / "docs" / "reference"

NEVER_RAISES = {"on_chief"}


def missing_sections(function: Callable[..., Any]) -> list[str]:
    """Return what the docstring of a public function or method lacks."""
    doc = inspect.getdoc(function) or ""
    if not doc:
        return ["docstring"]
    signature = inspect.signature(function)
    missing = [name for name in signature.parameters if name != "self" and not describes(doc, "Args", name)]
    is_value = signature.return_annotation not in ("None", None) and "Iterator" not in signature.return_annotation
    if is_value and "\nReturns:\n" not in doc and not doc.startswith("Return "):
        missing.append("Returns")
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if any(isinstance(node, ast.Raise) for node in ast.walk(definition)) and "\nRaises:\n" not in doc:
        missing.append("Raises")
    return missing


def describes(doc: str, section: str, name: str) -> bool:
    """Return whether a section of a docstring has an entry of this name."""
    found = re.search(rf"^{section}:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    return bool(found and re.search(rf"^ {{4}}\*{{0,2}}{name}: \S", found[1], re.MULTILINE))


def own_fields(kind: type) -> list[str]:
    """Return the public fields of a dataclass that its bases do not have."""
    inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "__dataclass_fields__", {})}
    return [f.name for f in dataclasses.fields(kind) if f.name not in inherited and not f.name.startswith("_")]


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines."""
    for name, member in vars(kind).items():
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield name, member


@pytest.mark.parametrize("name", rk.__all__)
def test_public_name_is_documented(name: str) -> None:
    public = getattr(rk, name)
    if not isinstance(public, type):
        assert missing_sections(public) == []
        assert name in NEVER_RAISES or "\nRaises:\n" in inspect.getdoc(public)
        return
    doc = inspect.cleandoc(vars(public)["__doc__"])
    if dataclasses.is_dataclass(public):
        assert [field for field in own_fields(public) if not describes(doc, "Attributes", field)] == []
    for method, member in methods(public):
        if isinstance(member, property):
            assert member.__doc__, f"{name}.{method}"
        else:
            assert missing_sections(member) == [], f"{name}.{method}"


def test_reference_lists_every_event_with_its_fields() -> None:
    listed = dict(re.findall(r"^\| (?:every )?`(\w+)` \| (.*) \|$", (REFERENCE / "events.md").read_text(), re.M))
    events = [rk.Event, *rk.Event.__subclasses__()]
    assert {name: re.findall(r"`(\w+)`", fields) for name, fields in listed.items()} == {
        event.__name__: own_fields(event) for event in events
    }
    assert {event.__name__ for event in events} <= set(rk.__all__)
    guide = (REFERENCE.parent / "guides" / "callbacks.md").read_text()
    table = guide[guide.index("| event | meaning |") :]
    assert all(f"`{event.__name__}`" in table for event in events[1:])


def test_every_public_name_has_one_place_in_the_reference() -> None:
    pages = [page.read_text() for page in REFERENCE.glob("*.md")]
    places = collections.Counter(name for page in pages for name in re.findall(r"^::: raykeras\.(\w+)$", page, re.M))
    assert places == dict.fromkeys(rk.__all__, 1)
