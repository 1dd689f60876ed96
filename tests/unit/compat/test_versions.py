"""Ranges of tested versions, and access to private names of other packages."""

from __future__ import annotations

import zipfile
from typing import Any

import pytest

import raykeras as rk
from raykeras.compat import versions
from raykeras.compat.versions import PrivateName, is_tested

PRESENT = PrivateName("pyarrow:Table.slice", "test")
MISSING = PrivateName("pyarrow:Table.no_such_name", "test names", "nothing is tested")


@pytest.fixture(autouse=True)
def tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "TESTED", {"pyarrow": ">=1.2,<1.10"})


@pytest.mark.parametrize("version", ["1.2", "1.2.0", "1.9.9", "1.3.0rc1"])
def test_versions_in_range_are_tested(version: str) -> None:
    assert is_tested("pyarrow", version)


@pytest.mark.parametrize("version", ["1.1.9", "1.10", "1.10.0.dev1", "2.0"])
def test_versions_out_of_range_are_untested(version: str) -> None:
    assert not is_tested("pyarrow", version)


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
