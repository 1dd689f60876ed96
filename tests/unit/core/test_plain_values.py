"""Options as JSON values, without secrets."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from raykeras import Run, Scale
from raykeras.core.plain_values import masked_command, plain_value


def test_options_become_json_values() -> None:
    values: dict[str, Any] = {
        "scale": Scale(workers=2),
        "run": Run(storage="s3://me:secret@host/runs?sig=secret", checkpoint_every="10min"),
        "class_weight": {0: np.float32(0.5), 1: 2},
        "every": timedelta(minutes=10),
        "function": len,
        "array": np.arange(10_000),
    }
    plain = json.loads(json.dumps(plain_value(values)))
    assert plain["scale"]["workers"] == 2
    assert plain["run"]["storage"] == "s3://***@host/runs?***"
    assert plain["class_weight"] == {"0": 0.5, "1": 2}
    assert plain["every"] == plain["run"]["checkpoint_every"] == "600s"
    assert len(plain["array"]) <= 200


def test_quoted_url_stays_valid_json() -> None:
    text = json.dumps(plain_value('see "s3://bucket/x?token=secret" now'))
    assert json.loads(text) == 'see "s3://bucket/x?***" now'


@pytest.mark.parametrize("name", ["api_key", "TOKEN", "db-password", "aws_secret", "credentials"])
def test_texts_named_like_secrets_are_masked(name: str) -> None:
    assert plain_value({name: "abc", "other": "abc", f"{name}_size": 3}) == {
        name: "***",
        "other": "abc",
        f"{name}_size": 3,
    }


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (["fit", "p.py", "-s", "api_key=abc=="], ["fit", "p.py", "-s", "api_key=***"]),
        (["--set=api_key=abc", "-sTOKEN=abc"], ["--set=api_key=***", "-sTOKEN=***"]),
        (["--token", "abc", "--epochs", "3"], ["--token", "***", "--epochs", "3"]),
        (["--use-key", "--epochs", "3"], ["--use-key", "--epochs", "3"]),
        (["-s", "data=s3://me:abc@host/x"], ["-s", "data=s3://***@host/x"]),
    ],
)
def test_secrets_in_commands_are_masked(given: list[str], stored: list[str]) -> None:
    assert masked_command(given) == stored
