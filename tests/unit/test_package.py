"""The package as a whole: public names, lazy imports, import order."""

from __future__ import annotations

import ast
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


def modules() -> list[str]:
    """Return the modules in the order of the README's tree."""
    tree = README.read_text().split("raykeras/\n", 1)[1].split("pipelines/")[0]
    names = [line.split("  ")[1] for line in tree.splitlines() if line.startswith("  ")]
    return [name.strip().rstrip("/") for line in names for name in line.split(",")]


def test_public_names_exist_and_are_sorted() -> None:
    assert raykeras.__all__ == sorted(raykeras.__all__)
    for name in raykeras.__all__:
        assert getattr(raykeras, name).__name__ == name
    assert {name for name in dir(raykeras) if not name.startswith("__")} == set(raykeras.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        raykeras.nothing  # noqa: B018


def test_import_is_lazy() -> None:
    code = (
        "import sys, raykeras, raykeras.cli, raykeras.plan, raykeras.events; "
        "print([m for m in ('ray', 'tensorflow', 'keras', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_driver_imports_neither_keras_nor_tensorflow() -> None:
    code = "import sys, raykeras.driver; print([m for m in ('tensorflow', 'keras', 'tf_keras') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_readme_lists_every_module() -> None:
    expected = {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"} | {"sources"}
    assert set(modules()) == expected


def test_modules_import_only_those_above() -> None:
    order = {name: i for i, name in enumerate(modules())}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        for imported in imports(path):
            assert imported == name or order[imported] < order[name], f"{path.name} imports {imported}"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "raykeras":
            found |= {alias.name for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raykeras."):
            found.add(str(node.module).split(".")[1])
    return found


def test_tests_named_in_documentation_exist() -> None:
    root = PACKAGE.parent
    defined = {
        match for path in root.glob("tests/**/*.py") for match in re.findall(r"def (test_\w+)", path.read_text())
    }
    for page in (README, root / "CONTRIBUTING.md", *root.glob("docs/**/*.md")):
        text, _, earlier = page.read_text().partition("## Where earlier tests are")
        text += re.sub(r"^\|[^|]*\|", "", earlier, flags=re.MULTILINE)  # the first column names tests that are gone
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
