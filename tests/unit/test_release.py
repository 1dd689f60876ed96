"""The release files agree with the project: its version, commands, extras and files. `make release-check` does more."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

import raykeras as rk
from raykeras.cli.main import fit
from tests.unit.test_constraints import pins

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CLASSIFIERS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)


@pytest.fixture
def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


@pytest.fixture
def ray_job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docs" / "guides" / "rayjob.yaml").read_text())


def pods(ray_job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the containers of the head and of the workers, by name."""
    cluster = ray_job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return {one["name"]: one for group in groups for one in group["template"]["spec"]["containers"]}


def test_all_files_have_the_same_version() -> None:
    assert f'\nversion = "{rk.__version__}"\n' in PYPROJECT
    assert f"\nversion: {rk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {rk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_metadata_lists_every_supported_python() -> None:
    required = re.search(r'^requires-python = "(.+)"', PYPROJECT, re.MULTILINE)[1]  # type: ignore[index]
    assert all(version in SpecifierSet(required) for version in CLASSIFIERS)
    assert required == f">={CLASSIFIERS[0]}"


def test_workflow_runs_targets_of_makefile(workflow: dict[str, Any]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert sorted(commands) == ["make docs", "make release-check", "make test"]
    assert {command.split()[1] for command in commands} <= targets


def test_workflow_tests_oldest_and_newest_python(workflow: dict[str, Any]) -> None:
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"] == [CLASSIFIERS[0], CLASSIFIERS[-1]]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    fixed = {str(step["with"]["python-version"]) for step in steps if "setup-python" in step.get("uses", "")}
    assert fixed == {CLASSIFIERS[-1], "${{ matrix.python-version }}"}


def test_dockerfile_copies_what_its_context_has() -> None:
    context = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = {
        source
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    }
    assert copied == context
    assert all((ROOT / source).exists() for source in copied)


def test_dockerfile_installs_existing_extras_on_pinned_ray() -> None:
    for extras in re.findall(r"EXTRAS=(\S+)", DOCKERFILE):
        assert all(re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE) for extra in extras.split(","))
    images = set(re.findall(r"rayproject/ray:\S+", DOCKERFILE))
    assert images == set(re.findall(r"rayproject/ray:\S+", (ROOT / "cluster.yaml").read_text()))
    assert all(image.startswith(f"rayproject/ray:{pins()['ray']}-py3") for image in images)


def test_ray_job_runs_image_of_dockerfile(ray_job: dict[str, Any]) -> None:
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == pins()["ray"]
    built = set(re.findall(r"--tag (\S+)", DOCKERFILE))
    assert {pod["image"] for pod in pods(ray_job).values()} == built
    assert all(image.split(":")[1].split("-")[0] == rk.__version__ for image in built)


def test_entrypoint_of_ray_job_is_a_command_that_fits_its_pods(ray_job: dict[str, Any]) -> None:
    program, command, *arguments = shlex.split(ray_job["spec"]["entrypoint"])
    assert (program, command) == ("raykeras", "fit")
    options = fit.make_context("fit", arguments).params
    workdir = re.search(r"^WORKDIR (.+)$", DOCKERFILE, re.MULTILINE)[1]  # type: ignore[index]
    assert (ROOT / Path(options["pipeline"]).relative_to(workdir)).exists()
    (workers,) = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert workers["replicas"] == options["workers"]
    limits = pods(ray_job)["ray-worker"]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == str(options["gpus_per_worker"])
    assert int(limits["cpu"]) > options["gpus_per_worker"]  # data tasks need another


def test_ray_job_requires_token_and_continues_run(ray_job: dict[str, Any]) -> None:
    assert ray_job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert ray_job["spec"]["backoffLimit"] and "--name" in ray_job["spec"]["entrypoint"]
