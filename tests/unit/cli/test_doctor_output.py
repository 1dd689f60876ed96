"""What `raykeras doctor` prints."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from raykeras.cli.doctor_output import show_checks
from raykeras.cli.main import main
from raykeras.doctor.checks import FAIL, PASS, WARN, Check

FOUND = [
    Check("Python", PASS, "3.11.7"),
    Check("storage", FAIL, "s3://bucket: PermissionError: \x1b[31m", "See that the URL is right."),
    Check("memory", PASS, "10.0 of 16.0 GiB available", node="b"),
    Check("Python", PASS, "3.11.7", node="b"),
    Check("GPUs", WARN, "NVIDIA's driver sees 4, Ray sees 0", "Start the node with `ray start`.", node="b"),
]


def test_problems_and_remedies_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_checks(FOUND)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "pass  Python    3.11.7",
        "fail  storage   s3://bucket: PermissionError: �[31m",
        "                → See that the URL is right.",
        "",
        "      node      b",
        "pass  2 checks  memory, Python",
        "warn  GPUs      NVIDIA's driver sees 4, Ray sees 0",
        "                → Start the node with `ray start`.",
        "",
        "3 passed, 1 warned, 1 failed",
    ]


def test_failed_check_is_the_exit_status() -> None:
    done = CliRunner().invoke(main, ["doctor", "--quick", "--storage", "nowhere://runs", "--json"])
    assert done.exit_code == 1
    report = json.loads(done.output)
    assert report["status"] == "fail"
    (failed,) = [check for check in report["checks"] if check["status"] == "fail"]
    assert failed["name"] == "storage" and failed["remedy"]
