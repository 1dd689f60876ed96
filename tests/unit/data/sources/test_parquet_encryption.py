"""Encrypted Parquet files: unencrypted columns are read, encrypted ones are refused, and the process never aborts."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import raykeras as rk
from raykeras.cli.main import main
from raykeras.data.resolve import resolve
from raykeras.data.sources import parquet_footers

encryption = pytest.importorskip("pyarrow.parquet.encryption")

TABLE = pa.table(
    {
        "x": np.arange(10.0),
        "secret": np.arange(10.0),
        "code": pa.array([[1, 2]] * 10, pa.list_(pa.uint8())),
        "hidden": pa.array([[1, 2]] * 10, pa.list_(pa.uint8())),
        "pair": pa.array([{"a": 1, "b": 2}] * 10),
    }
)


class Kms(encryption.KmsClient):  # type: ignore[misc]
    """A key management service that does not encrypt keys."""

    def __init__(self, _: object) -> None:
        super().__init__()

    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64decode(key)


def write(path: Path, columns: list[str], plaintext_footer: bool = True) -> Path:
    configuration = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"key": columns}, plaintext_footer=plaintext_footer
    )
    factory = encryption.CryptoFactory(Kms)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), configuration)
    with pq.ParquetWriter(path, TABLE.schema, encryption_properties=properties) as writer:
        writer.write_table(TABLE, row_group_size=4)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "a.parquet", ["secret", "hidden.list.element", "pair.b"])


def test_statistics_of_encrypted_column_abort_pyarrow(path: Path) -> None:
    """When this fails, `raykeras.data.sources.parquet_encryption` can be removed."""
    code = f"import pyarrow.parquet as pq; pq.read_metadata({str(path)!r}).row_group(0).column(1)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0


def test_unencrypted_columns_are_read(path: Path) -> None:
    source = rk.parquet(path, x={"x": "x", "code": "code"})
    opened = source.open()
    batch_spec = resolve(source, opened)
    columns = opened.reader.read(opened.unit(1), 0, 4, batch_spec.columns)
    x, code = batch_spec.assemble(batch_spec.decode(columns, ""), "")
    np.testing.assert_array_equal(x, np.arange(4, 8))
    np.testing.assert_array_equal(code, [[1, 2]] * 4)


@pytest.mark.parametrize("name", ["secret", "hidden", "pair"])
def test_encrypted_column_is_refused(name: str, path: Path) -> None:
    message = (
        rf"readable without a key; '{name}' is encrypted in file .*a\.parquet, as are all of 'hidden', 'pair', 'secret'"
    )
    with pytest.raises(rk.SourceError, match=message):
        rk.parquet(path, x="x", y=name).open()
    with pytest.raises(rk.SourceError, match=message):  # as for columns that are written with predictions
        rk.parquet(path, x="x").open().field(name)


def test_one_encrypted_file_of_many_is_named(tmp_path: Path, path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "0.parquet")
    with pytest.raises(rk.SourceError, match=r"'secret' is encrypted in file .*a\.parquet"):
        rk.parquet(tmp_path, x="secret").open()
    assert rk.parquet(tmp_path, x="x").open().num_rows == 20


def test_encrypted_footer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["secret"], plaintext_footer=False)
    with pytest.raises(rk.SourceError, match=r"readable without a key; '.*a\.parquet' has an encrypted footer"):
        rk.parquet(path, x="x").open()


def test_encryption_is_cached(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYKERAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parquet_footers, "_MIN_CACHED_FILES", 1)
    for num_kept in (0, 1):
        opened = rk.parquet(path, x="x").open()
        assert opened.num_cached_footers == num_kept
        assert sorted(opened.unusable) == ["hidden", "pair", "secret"]


def test_inspect_shows_encrypted_columns(path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert "cannot be read" in lines["secret"]
    assert "cannot be read" not in lines["x"]


def test_new_pipeline_leaves_encrypted_columns_out(path: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["new", str(tmp_path / "p.py"), "--data", str(path), "--y", "x"])
    assert result.exit_code == 0, result.output
    assert "left out: secret, hidden, pair" in result.output
