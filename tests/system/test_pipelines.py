"""The command at the start of each pipeline's docstring runs as written."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from raykeras.cli.main import main
from tests.support.fork_server import ForkServer

PIPELINES = Path(__file__).parents[2] / "pipelines"


def run_command(arguments: list[str]) -> None:
    main(arguments)


@pytest.mark.parametrize(
    ("name", "options", "num_epochs", "metric"),
    [
        ("multi_io", ["-s", "data={folder}/data"], {5}, "val_class_output_categorical_accuracy"),
        ("imbalanced", [], set(range(3, 13)), "val_auc"),
    ],
)
def test_documented_command_runs(
    name: str, options: list[str], num_epochs: set[int], metric: str, forked: ForkServer, tmp_path: Path
) -> None:
    documentation = ast.get_docstring(ast.parse((PIPELINES / f"{name}.py").read_text())) or ""
    command = shlex.split(re.findall(r"^ +raykeras (.*)$", documentation, re.MULTILINE)[0])
    options = [option.format(folder=tmp_path) for option in options]
    ended = forked.run(run_command, [*command, "--storage", str(tmp_path / "runs"), *options])
    assert ended.exit_code == 0, ended.output
    shown = re.findall(rf"^Epoch (\d+)/.* {metric}: ([\d.]+)", ended.output, re.MULTILINE)
    assert [int(epoch) for epoch, _ in shown] == list(range(1, len(shown) + 1))
    assert len(shown) in num_epochs
    assert float(shown[-1][1]) > float(shown[0][1])
    assert list((tmp_path / "runs").glob(f"{name}-*/checkpoints/epoch-{len(shown):06d}/model.keras"))
