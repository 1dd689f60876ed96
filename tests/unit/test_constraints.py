"""Requirements match the tested ranges, and all extras can be installed at the pinned versions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from raykeras.compat.versions import TESTED
from tests.compat.versions import CHECKS, SETS

EXTRAS = ("s3", "gcs", "legacy", "integrations", "test", "docs", "release", "keras-suite")
ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints.txt"


def pins() -> dict[str, str]:
    """Return the pinned version of each package on this Python."""
    lines = [Requirement(line) for line in CONSTRAINTS.read_text().splitlines()]
    return {
        canonicalize_name(line.name): next(iter(line.specifier)).version
        for line in lines
        if line.marker is None or line.marker.evaluate()
    }


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Yield each requirement of raykeras and of its installed dependencies, with the requiring package's name."""
    waiting, seen = [("raykeras", frozenset(EXTRAS))], set()
    while waiting:
        package = waiting.pop()
        if package in seen:
            continue
        seen.add(package)
        name, extras = package
        try:
            found = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:  # its extra is not installed
            continue
        for required in found:
            marker = required.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                if canonicalize_name(required.name) != "raykeras":  # an extra that includes another
                    yield name, required
                waiting.append((canonicalize_name(required.name), frozenset(required.extras)))


def test_pins_satisfy_every_requirement() -> None:
    pinned = pins()
    conflicts = [
        f"{name} requires {required}; pinned is {pinned[canonicalize_name(required.name)]}"
        for name, required in requirements()
        if canonicalize_name(required.name) in pinned
        and not required.specifier.contains(pinned[canonicalize_name(required.name)], prereleases=True)
    ]
    assert not conflicts


def test_every_required_package_is_pinned() -> None:
    missing = {required.name for _, required in requirements() if canonicalize_name(required.name) not in pins()}
    assert not missing


def test_every_line_pins_one_version() -> None:
    for line in CONSTRAINTS.read_text().splitlines():
        assert re.fullmatch(r'[\w.-]+==[\w.]+( ; python_version (<|>=) "[\d.]+")?', line), line


def test_requirements_match_tested_ranges() -> None:
    lines = re.findall(r'"([\w-]+)(?:\[[\w,-]+\])?([<>=][^"]+)"', (ROOT / "pyproject.toml").read_text())
    for package, tested in TESTED.items():
        assert {ranges for name, ranges in lines if name == package} == {tested}


def test_documented_ranges_are_the_requirements() -> None:
    page = (ROOT / "docs" / "reference" / "versions.md").read_text()
    required = dict(re.findall(r'"([\w-]+)(?:\[[\w,-]+\])?([<>=][^"]+)"', (ROOT / "pyproject.toml").read_text()))
    for package in (*TESTED, "numpy", "fsspec"):
        assert f"| {package} | `{required[package]}` |" in page


def test_documented_versions_of_trackers_are_pinned() -> None:
    page = (ROOT / "docs" / "guides" / "trackers.md").read_text()
    documented = dict(re.findall(r"^\| [\w& ]+ \| ([\w-]+)[^|]* \| ([\d.]+) \|$", page, re.MULTILINE))
    assert set(documented) == {"mlflow-skinny", "wandb", "comet_ml", "tensorboard"}
    assert documented == {package: pins()[canonicalize_name(package)] for package in documented}


def test_pins_are_in_tested_ranges() -> None:
    for package, tested in TESTED.items():
        assert pins()[canonicalize_name(package)] in SpecifierSet(tested)


def test_version_sets_are_the_ends_of_the_tested_ranges() -> None:
    sets = {name: dict(pin.split("==") for pin in lines) for name, lines in SETS.items()}
    for package, tested in TESTED.items():
        assert all(versions[package] in SpecifierSet(tested) for versions in sets.values())
        oldest = tested.split(",")[0].removeprefix(">=")
        assert sets["oldest"][package].startswith(f"{oldest}.")
    for package, version in sets["newest"].items():
        assert f"{package}=={version}" in {line.split(" ;")[0] for line in CONSTRAINTS.read_text().splitlines()}


def test_checks_of_version_sets_exist() -> None:
    for test in itertools.chain.from_iterable(CHECKS.values()):
        file, _, name = test.partition("::")
        if name:
            assert f"def {name}(" in (ROOT / file).read_text()
