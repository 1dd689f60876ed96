"""The package as a whole: public names, lazy imports, import order."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import raykeras
from tests.compat.keras_suite import REASONS

PACKAGE = Path(raykeras.__file__).parent
README = PACKAGE.parent / "README.md"


PACKAGES = ["core", "compat", "data", "checkpoint", "distribute", "worker", "driver", "report", "doctor", "cli"]
"""In dependency order; `data` and `checkpoint` do not import each other."""

DATA = ["data.sources", "data", "data.streaming", "data.adapters", "data.train_input", "data.inputs", "data.preview"]
"""Parts of `data` in dependency order."""

METHODS = ("data.sources.base", "data.preview")
"""The one import against the order, within methods: `Source.head` and `Source.batch` need all of `data`."""


def test_public_names_exist_and_are_sorted() -> None:
    assert raykeras.__all__ == sorted(raykeras.__all__)
    for name in raykeras.__all__:
        assert getattr(raykeras, name).__name__ == name
    assert {name for name in dir(raykeras) if not name.startswith("__")} == set(raykeras.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raykeras.nothing  # noqa: B018


def test_import_is_lazy() -> None:
    code = (
        "import sys, raykeras, raykeras.cli.main, raykeras.data.plan, raykeras.core.events; "
        "print([m for m in ('ray', 'tensorflow', 'keras', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_driver_imports_neither_keras_nor_tensorflow() -> None:
    code = (
        "import sys, raykeras.driver.fit; print([m for m in ('tensorflow', 'keras', 'tf_keras') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_readme_lists_every_package() -> None:
    tree = README.read_text().split("raykeras/\n", 1)[1].split("pipelines/")[0]
    listed = [line.split()[0].replace("/", ".") for line in tree.splitlines()]
    assert [name for name in listed if "." not in name] == PACKAGES
    folders = [path.parent.relative_to(PACKAGE) for path in PACKAGE.rglob("*/__init__.py")]
    assert set(listed) == {".".join(folder.parts) for folder in folders}


def test_architecture_page_lists_every_module() -> None:
    page = (README.parent / "docs/design/architecture.md").read_text()
    for folder, section in re.findall(r"^### `([\w/]+)`\n(.*?)(?=^##)", page, re.DOTALL | re.MULTILINE):
        rows = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
        listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
        assert listed == {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}, folder


def test_packages_import_only_earlier_ones() -> None:
    for module, imported in imports():
        package, other = module.split(".")[0], imported.split(".")[0]
        is_earlier = PACKAGES.index(other) < PACKAGES.index(package)
        assert package == other or (is_earlier and (other, package) != ("data", "checkpoint")), (
            f"{module} imports {imported}"
        )


def test_parts_of_data_import_only_earlier_ones() -> None:
    for module, imported in imports():
        if module.startswith("data") and imported.startswith("data"):
            assert part_of_data(imported) <= part_of_data(module), f"{module} imports {imported}"


def part_of_data(module: str) -> int:
    return max(i for i, part in enumerate(DATA) if module == part or module.startswith(f"{part}."))


def test_imports_have_no_cycles() -> None:
    edges: dict[str, set[str]] = {}
    for module, imported in imports():
        edges.setdefault(module, set()).add(imported)
    tuple(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError


def imports() -> list[tuple[str, str]]:
    """Return every import of a module of raykeras by another, also within functions."""
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    pairs = []
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not str(node.module).startswith("raykeras."):
                continue
            base = str(node.module).removeprefix("raykeras.")
            names = {f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names}
            pairs += [(module, name) for name in sorted(names) if module not in ("__init__", name)]
    return [pair for pair in pairs if pair != METHODS]


def test_tests_named_in_documentation_exist() -> None:
    root = PACKAGE.parent
    defined = {
        match for path in root.glob("tests/**/*.py") for match in re.findall(r"def (test_\w+)", path.read_text())
    }
    for page in (README, root / "CONTRIBUTING.md", *root.glob("docs/**/*.md")):
        text, _, earlier = page.read_text().partition("## Earlier tests")
        text += re.sub(r"^\|[^|]*\|", "", earlier, flags=re.MULTILINE)  # the first column names removed tests
        named = set(re.findall(r"`(?:[\w/.]+::)?(test_\w+)", text))
        assert named <= defined, f"{page.name} names {sorted(named - defined)}"
        files = re.findall(r"`((?:tests|benchmarks|pipelines)/[\w/]+\.py)", text)
        missing = [name for name in files if not (root / name).exists()]
        assert not missing, f"{page.name} names {missing}"


def test_reasons_of_keras_suite_are_documented() -> None:
    page = (PACKAGE.parent / "docs/design/keras_suite.md").read_text()
    for tests in json.loads(REASONS.read_text()).values():
        for start, reason in tests.items():
            assert f"| {start}" in page
            assert reason in page
