"""Temporary folders are removed after use; those of killed processes are removed by the next process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raykeras.core.temporary import TemporaryFolder, remove_abandoned


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which a test's temporary folders are created."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folder_is_removed_after_use(folder: Path) -> None:
    with TemporaryFolder("log") as path:
        Path(path, "events.jsonl").write_text("{}")
    held = TemporaryFolder("artifacts")
    remove_abandoned()
    assert [entry.name for entry in folder.iterdir()] == [Path(held.name).name]
    held.cleanup()
    assert not list(folder.iterdir())


def test_folder_of_killed_process_is_removed(folder: Path) -> None:
    code = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]; "
        "from raykeras.core.temporary import TemporaryFolder; "
        "folder = TemporaryFolder('unkept'); open(folder.name + '/file', 'w').close(); print(folder.name, flush=True); "
        "sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        remove_abandoned()
        assert (path / "file").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
        remove_abandoned()
    assert not list(folder.iterdir())


def test_unrelated_folders_are_kept(folder: Path) -> None:
    names = ["raykeras-data", "raykeras-log-mine", "raykeras-other-abcd1234", "tmpabcd1234"]
    for name in names:
        (folder / name).mkdir()
    (folder / "raykeras-log-abcd1234").write_text("a file")
    (folder / "raykeras-log-abcd1235").symlink_to(folder / "raykeras-data")
    remove_abandoned()
    assert {*names, "raykeras-log-abcd1234", "raykeras-log-abcd1235"} == set(os.listdir(folder))
