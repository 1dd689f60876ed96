"""Ranges of tested versions, and access to private names of other packages."""

from __future__ import annotations

import dataclasses
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

import raykeras as rk
from raykeras.compat import versions
from raykeras.compat.versions import PrivateName, is_tested

PRESENT = PrivateName("pyarrow:Table.slice", "test")
MISSING = PrivateName("pyarrow:Table.no_such_name", "test names", "nothing is tested")


PACKAGES = ("ray", "tensorflow", "keras", "tf_keras", "pyarrow")
PUBLIC = (rk.fit, rk.evaluate, rk.predict)


@pytest.fixture(autouse=True)
def tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TESTED", dict.fromkeys(PACKAGES, ">=1.2,<1.10"))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that sets the versions that count as installed, by package; 1.2.0 unless given."""

    def set_versions(**installed: str | None) -> None:
        versions.warn_once.cache_clear()
        monkeypatch.setattr(versions, "installed_version", lambda package: installed.get(package, "1.2.0"))

    return set_versions


@pytest.mark.parametrize("version", ["1.2", "1.2.0", "1.9.9", "1.3.0rc1"])
def test_versions_in_range_are_tested(version: str) -> None:
    assert is_tested("pyarrow", version)


@pytest.mark.parametrize("version", ["1.1.9", "1.10", "1.10.0.dev1", "2.0"])
def test_versions_out_of_range_are_untested(version: str) -> None:
    assert not is_tested("pyarrow", version)


@pytest.mark.parametrize("function", PUBLIC)
@pytest.mark.parametrize("package", ["ray", "tensorflow", "keras", "pyarrow"])
def test_older_package_is_refused_at_start(package: str, function: Any, install: Callable[..., None]) -> None:
    install(**{package: "1.1.9"})
    message = rf"needs {package}>=1.2,<1.10; got {package} 1.1.9, which is older. Install `{package}>=1.2,<1.10`"
    with pytest.raises(rk.RaykerasError, match=message):
        function(None, None)


@pytest.mark.parametrize("package", ["keras", "tf_keras"])
def test_older_package_of_model_is_refused(package: str, install: Callable[..., None]) -> None:
    install(**{package: "1.1.9"})
    with pytest.raises(rk.RaykerasError, match=f"got {package} 1.1.9, which is older"):
        versions.refuse_older(package)


@pytest.mark.parametrize("function", PUBLIC)
@pytest.mark.parametrize("package", ["ray", "tensorflow", "pyarrow"])
def test_newer_package_is_one_warning(package: str, function: Any, install: Callable[..., None]) -> None:
    install(**{package: "1.10.0"})
    invalid: dict[str, Any] = {"scale": "large"}
    with pytest.warns(UserWarning, match=rf"tested with {package}>=1.2,<1.10; got {package} 1.10.0") as warned:
        with pytest.raises(rk.OptionError):
            function(None, None, **invalid)
        with pytest.raises(rk.OptionError):
            function(None, None, **invalid)
    assert [warning.filename for warning in warned] == [__file__]


def test_newer_keras_and_unknown_packages_are_accepted(install: Callable[..., None]) -> None:
    install(keras="1.10.0", tf_keras="1.0", tensorflow=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_installed()


def test_name_that_earlier_releases_do_not_need(install: Callable[..., None]) -> None:
    name = dataclasses.replace(MISSING, since="1.3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install(pyarrow="1.2.9")
        assert name.find() is None and not name.is_expected
        install(pyarrow="1.3.0")
        with pytest.raises(UserWarning, match="Without it, nothing is tested"):
            name.find()


def test_missing_name_raises_or_warns() -> None:
    with pytest.raises(rk.RaykerasError, match=r"no_such_name` to test names; pyarrow .* Install `pyarrow>=1.2,<1.10`"):
        MISSING.get()
    with pytest.raises(rk.RaykerasError, match="no_such_name"), MISSING.replaced(None):
        pass
    with pytest.raises(rk.RaykerasError, match="no_such_name"):
        MISSING.of(object())
    with pytest.warns(UserWarning, match="Without it, nothing is tested"):
        assert MISSING.find() is None


def test_names_are_replaced_and_restored() -> None:
    import pyarrow as pa

    original, table, other = pa.lib.Table.slice, _Table(), _Table()
    assert PRESENT.get() is original and PRESENT.attribute == "slice"
    name = PrivateName("zipfile:ZipFile.namelist", "test")
    with name.replaced(lambda self: ["replaced"]):
        assert zipfile.ZipFile.namelist(None) == ["replaced"]  # type: ignore[arg-type]
    assert name.get() is zipfile.ZipFile.namelist
    with PRESENT.replaced_on(table, lambda: 2):
        assert (table.slice(), other.slice()) == (2, 1)
    assert PRESENT.of(table)() == 1


class _Table:
    def slice(self) -> Any:
        return 1
