"""NumPy sources: memory-mapped files, archives, and in-memory arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import raykeras as rk
from raykeras.data.sources.arrays import from_arrays, open_npy


def test_npy_file_is_memory_mapped(tmp_path: Path) -> None:
    x, y = np.arange(40.0).reshape(20, 2), np.arange(20)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    source = rk.npy(tmp_path / "x.npy", tmp_path / "y.npy")
    opened = source.open()
    assert isinstance(open_npy(str(tmp_path / "x.npy")), np.memmap)
    assert not opened.reader.in_memory
    read = opened.slice(5, 9).head(3, ["x", "y"])
    np.testing.assert_array_equal(read["x"], x[5:8])
    np.testing.assert_array_equal(read["y"], y[5:8])


def test_npz_arrays_are_read_by_key(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=np.ones((6, 3)), y_train=np.arange(6), x_test=np.ones((2, 3)))
    opened = rk.npy(tmp_path / "d.npz", "y_train", x="x_train").open()
    assert opened.num_rows == 6
    assert set(opened.fields) == {"x_train", "y_train"}
    with pytest.raises(rk.ColumnError, match=r"got 'x_trian'. Did you mean 'x_train'\?"):
        rk.npy(tmp_path / "d.npz", x="x_trian").open()
    with pytest.raises(rk.OptionError, match="needs the key of x"):
        rk.npy(tmp_path / "d.npz")


def test_arrays_are_named_by_input_and_output() -> None:
    source = from_arrays({"a": np.ones((4, 2)), "b": np.ones(4)}, {"out": np.ones(4)})
    assert source.x == {"a": "x.a", "b": "x.b"}
    assert source.y == {"out": "y.out"}
    assert source.open().num_rows == 4


def test_length_mismatch_names_both_arrays(tmp_path: Path) -> None:
    with pytest.raises(rk.ValidationError, match=r"(?s)10.*9"):
        from_arrays(np.ones((10, 2)), np.ones(9)).open()
    np.save(tmp_path / "x.npy", np.ones(10))
    np.save(tmp_path / "y.npy", np.ones(9))
    with pytest.raises(rk.ValidationError, match=r"(?s)x\.npy.*y\.npy"):
        rk.npy(tmp_path / "x.npy", tmp_path / "y.npy").open()


def test_missing_and_invalid_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(rk.SourceError, match=r"there is no '.*none\.npy'"):
        rk.npy(tmp_path / "none.npy").open()
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    with pytest.raises(rk.SourceError, match=r"bad\.npy"):
        rk.npy(tmp_path / "bad.npy").open()
    (tmp_path / "bad.npz").write_bytes(b"not an archive")
    with pytest.raises(rk.SourceError, match=r"bad\.npz"):
        rk.npy(tmp_path / "bad.npz", x="x").open()


def test_scalar_is_refused() -> None:
    with pytest.raises(rk.ColumnError, match="scalar"):
        from_arrays(np.float32(1)).open()
