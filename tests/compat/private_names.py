"""The private names that the modules of `raykeras.compat` declare.

    python -m tests.compat.private_names

prints the first table of `docs/design/private-names.md`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import raykeras.compat
from raykeras.compat.versions import PrivateName


def modules() -> Iterator[ModuleType]:
    """Import and yield every module of `raykeras.compat`."""
    for info in pkgutil.iter_modules(raykeras.compat.__path__, "raykeras.compat."):
        yield importlib.import_module(info.name)


def declared() -> list[PrivateName]:
    """Return every `PrivateName`, sorted by path."""
    names = {value for module in modules() for value in vars(module).values() if isinstance(value, PrivateName)}
    return sorted(names, key=lambda name: name.path)


def instance_names() -> list[str]:
    """Return the path of every attribute that only instances have, sorted."""
    return sorted({path for module in modules() for path in getattr(module, "INSTANCE_NAMES", ())})


def row(name: PrivateName) -> str:
    """Return the row of the table for a name."""
    since = f" (since {name.package} {name.since})" if name.since else ""
    return f"| `{name.path}`{since} | {name.purpose} | {name.fallback or '**an error**'} |"


def main() -> None:
    print("| name | used to | without it |\n| --- | --- | --- |")
    print("\n".join(map(row, declared())))


if __name__ == "__main__":
    main()
