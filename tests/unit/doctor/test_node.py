"""What is found on a machine: files, ports and packages of this one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from raykeras.doctor import node
from raykeras.doctor.examination import examine
from raykeras.doctor.storage import TrialFolder


def test_failing_import_of_tensorflow_is_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorflow.py").write_text("import no_such_library")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    error = "ModuleNotFoundError: No module named 'no_such_library'"
    assert node.import_tensorflow(60.0) == {"error": error}


def test_slow_import_of_tensorflow_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorflow.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert node.import_tensorflow(0.2) == {"error": "not imported within 0.2 s"}


def test_trial_folder_leaves_nothing(tmp_path: Path) -> None:
    folder = TrialFolder(f"{tmp_path}/new/runs", 60.0)
    assert folder.create() is None
    assert node.NodeProbe().visit(folder.path, "b") is None
    assert folder.has("b") and not folder.has("c")
    assert folder.remove() is None
    assert list(tmp_path.iterdir()) == []


def test_storage_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder = TrialFolder(str(tmp_path), 60.0)
    assert folder.create() is None and folder.remove() is None
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_storage_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Error: " in str(TrialFolder(f"{tmp_path}/file", 60.0).create())
    assert "ValueError: Protocol not known: nowhere" in str(TrialFolder("nowhere://runs", 60.0).create())


def test_folder_without_file_of_driver_is_not_written_to(tmp_path: Path) -> None:
    assert node.NodeProbe().visit(f"{tmp_path}/elsewhere", "b") == node.NOT_THERE
    assert list(tmp_path.iterdir()) == []


def test_unreachable_address_is_found() -> None:
    probe = node.NodeProbe()
    port = probe.listen("127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # does not listen
        assert probe.unreachable([("127.0.0.1", port), closed.getsockname()]) == [1]
    probe.close()


def test_examination_of_this_machine(tmp_path: Path) -> None:
    found = {check.name: check for check in examine(None, str(tmp_path), 60.0, imports_tensorflow=False)}
    assert list(found) == ["Python", "packages", "GPUs", "memory", "object store", "disk", "ports", "storage"]
    assert found["storage"].status == "pass"
