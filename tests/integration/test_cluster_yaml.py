"""`cluster.yaml` is valid and agrees with the rest of the project.

Ray's own functions fill in its defaults and check it, as `ray up` does before it contacts AWS.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
PROJECT = "/home/ray/raykeras"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with Ray's defaults for AWS, checked against Ray's schema."""
    filled = prepare_config(copy.deepcopy(config))
    validate_config(filled)
    return filled


def test_ray_accepts_config(config: dict[str, Any]) -> None:
    filled = prepared(config)
    assert set(filled["available_node_types"]) == {"head", "gpu_worker"}
    assert filled["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("head_node_type", "haed", ValueError),
        ("max_worker", 8, jsonschema.ValidationError),
        ("max_workers", "8", jsonschema.ValidationError),
    ],
)
def test_ray_rejects_invalid_config(config: dict[str, Any], key: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        prepared({**config, key: value})


def test_gpu_nodes_fit_documented_command(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert not head["resources"].get("GPU")
    assert sum(t["max_workers"] for t in types.values()) == config["max_workers"]
    command = (ROOT / "cluster.yaml").read_text().split("head_node_type")[0]
    workers, gpus = (int(re.search(rf"--{o} (\d+)", command)[1]) for o in ("workers", "gpus-per-worker"))  # type: ignore[index]
    assert sum(t["max_workers"] for t in types.values() if t["resources"]["GPU"] >= gpus) >= workers
    # each worker holds a CPU, and data tasks need another
    assert all(t["resources"]["CPU"] > t["resources"]["GPU"] for t in types.values())


def test_nodes_run_pinned_ray(config: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    images = (config["docker"]["head_image"], config["docker"]["worker_image"])
    assert all(image.startswith(f"rayproject/ray:{pinned[1]}-py3") for image in images)
    assert len({re.search(r"-py(\d+)", image)[1] for image in images}) == 1  # type: ignore[index]
    filled = prepared(config)
    commands = filled["setup_commands"] + filled["head_setup_commands"] + filled["worker_setup_commands"]
    assert not [command for command in commands if "ray-wheels" in command]


def test_nodes_install_checkout_with_existing_extras(config: dict[str, Any]) -> None:
    assert config["file_mounts"][PROJECT] == "."
    pyproject = (ROOT / "pyproject.toml").read_text()
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        (command,) = commands
        assert command.startswith(f"cd {PROJECT} && pip install --constraint constraints.txt ")
        extras = re.search(r"\.\[([\w,]+)\]", command)
        assert extras
        assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras[1].split(","))


def test_nodes_require_token(config: dict[str, Any]) -> None:
    filled = prepared(config)
    assert filled["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in filled["docker"]["run_options"]
