"""What each check of `raykeras doctor` says about a machine, and what it tells the user to do."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from raykeras.doctor import checks
from raykeras.doctor.checks import FAIL, PASS, WARN, Machine
from raykeras.doctor.node import NodeProbe

GIB = 1 << 30

HERE = Machine(**NodeProbe().report(None))
"""This machine."""

GOOD = dataclasses.replace(
    HERE,
    versions={
        "Python": "3.11.7",
        "raykeras": "0.1.0",
        "ray": "2.60.0",
        "tensorflow": "2.21.0",
        "keras": "3.15.1",
        "tf_keras": "2.21.0",
        "pyarrow": "26.0.1",
    },
    tensorflow={"gpus": 0, "backend": "tensorflow"},
    num_gpus=0,
    memory_nbytes=(16 * GIB, 10 * GIB),
    shm_nbytes=(8 * GIB, 8 * GIB),
    temporary_nbytes=(100 * GIB, 50 * GIB),
)


def machine(**values: Any) -> Machine:
    return dataclasses.replace(GOOD, **values)


def with_versions(**versions: str | None) -> Machine:
    return machine(versions={**GOOD.versions, **versions})


def test_good_machine_passes() -> None:
    found = checks.machine_checks(GOOD)
    assert {check.status for check in found} == {PASS}
    names = ["Python", "packages", "TensorFlow", "GPUs", "memory", "object store", "disk"]
    assert [check.name for check in found] == names
    assert not any(check.remedy for check in found)


def test_this_machine_has_installed_packages() -> None:
    assert checks.python_check(HERE).status == PASS
    assert checks.packages_check(HERE).status == PASS
    assert checks.versions_check(HERE, HERE).status == PASS


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("keras", "3.15.1", PASS),
        ("keras", None, FAIL),
        ("keras", "3.11.3", FAIL),
        ("keras", "3.16.0", WARN),
        ("tf_keras", None, PASS),
        ("tf_keras", "2.18.0", FAIL),
    ],
)
def test_packages_are_in_tested_ranges(package: str, version: str | None, status: str) -> None:
    check = checks.packages_check(with_versions(**{package: version}))
    assert check.status == status
    assert (f'pip install "{package}>=' in check.remedy) == (status != PASS)


def test_oldest_python_is_the_required_one() -> None:
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert re.search(r'^requires-python = ">=(\d+)\.(\d+)"', pyproject, re.MULTILINE)[0].endswith(  # type: ignore[index]
        f'>={".".join(map(str, checks.OLDEST_PYTHON))}"'
    )
    assert checks.python_check(with_versions(Python="3.9.21")).status == FAIL


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"error": "ImportError: libcudart.so.12"}, "import fails: ImportError: libcudart.so.12"),
        ({"gpus": 0, "backend": "jax"}, "Keras' backend is jax"),
    ],
)
def test_tensorflow_must_import_and_be_the_backend(answer: dict[str, Any], said: str) -> None:
    check = checks.tensorflow_check(machine(tensorflow=answer))
    assert (check.status, check.found) == (FAIL, said)
    assert check.remedy


@pytest.mark.parametrize(
    ("devices", "tensorflow", "ray", "status", "remedy"),
    [
        (0, 0, None, PASS, ""),
        (4, 4, 4.0, PASS, ""),
        (4, None, 4.0, PASS, ""),
        (0, 1, 1.0, PASS, ""),  # not NVIDIA's
        (4, 0, 4.0, FAIL, "raykeras[gpu]"),
        (4, 2, 4.0, WARN, "CUDA_VISIBLE_DEVICES"),
        (4, 4, 0.0, WARN, "--num-gpus"),
        (4, None, 0.0, WARN, "--num-gpus"),
    ],
)
def test_tensorflow_and_ray_see_all_gpus(
    devices: int, tensorflow: int | None, ray: float | None, status: str, remedy: str
) -> None:
    answer = None if tensorflow is None else {"gpus": tensorflow, "backend": "tensorflow"}
    check = checks.gpus_check(machine(num_gpus=devices, tensorflow=answer, ray_gpus=ray))
    assert check.status == status
    assert remedy in check.remedy and bool(remedy) == bool(check.remedy)


@pytest.mark.parametrize(
    ("available", "status"), [(10 * GIB, PASS), (int(1.5 * GIB), WARN), (GIB // 2, FAIL)], ids=[PASS, WARN, FAIL]
)
def test_memory_is_enough_for_a_worker(available: int, status: str) -> None:
    check = checks.memory_check(machine(memory_nbytes=(16 * GIB, available)))
    assert check.status == status
    assert "of 16.0 GiB available" in check.found


def test_object_store_fits_in_shared_memory() -> None:
    docker = machine(shm_nbytes=(64 << 20, 64 << 20))
    check = checks.object_store_check(docker)
    assert check.status == WARN
    assert "takes 3.0 GiB" in check.found and "--shm-size=3.3g" in check.remedy
    running = machine(shm_nbytes=(4 * GIB, GIB), store_nbytes=3.0 * GIB, node="b")
    assert checks.object_store_check(running).status == PASS  # the store itself takes the rest
    assert checks.object_store_check(machine(shm_nbytes=None)).status == PASS


def test_full_disk_is_a_warning() -> None:
    assert checks.disk_check(machine(temporary_nbytes=(100 * GIB, 4 * GIB))).status == WARN


@pytest.mark.parametrize(
    ("other", "status", "said"),
    [
        ({}, PASS, "the same as here"),
        ({"Python": "3.11.9"}, WARN, "Python 3.11.9 (here 3.11.7)"),
        ({"Python": "3.12.1"}, FAIL, "Python 3.12.1 (here 3.11.7)"),
        ({"pyarrow": "25.0.1"}, WARN, "pyarrow 25.0.1 (here 26.0.1)"),
        ({"tf_keras": None}, WARN, "tf_keras missing (here 2.21.0)"),
        ({"raykeras": None}, FAIL, "raykeras missing (here 0.1.0)"),
        ({"tensorflow": "2.20.0"}, FAIL, "tensorflow 2.20.0 (here 2.21.0)"),
    ],
)
def test_difference_of_versions_names_both(other: dict[str, str | None], status: str, said: str) -> None:
    check = checks.versions_check(machine(node="b", versions={**GOOD.versions, **other}), GOOD)
    assert (check.status, check.found, check.node) == (status, said, "b")
    assert bool(check.remedy) == (status != PASS)


def test_storage_remedy_depends_on_error() -> None:
    missing = checks.storage_check("s3://user:secret@bucket", "ImportError: Install s3fs to access S3")
    assert "raykeras[s3]" in missing.remedy and "secret" not in missing.found
    assert "may write" in checks.storage_check("/data", "PermissionError: /data").remedy
    private = checks.storage_check("/data", "the file that the driver wrote is not there", "b", is_shared=False)
    assert (private.status, private.node) == (FAIL, "b") and "all machines share" in private.remedy
    assert checks.storage_check("/data", None).status == PASS


def test_ports() -> None:
    assert checks.address_check("10.0.0.1", True, []).status == PASS
    assert checks.address_check("10.0.0.1", False, []).status == FAIL
    used = checks.address_check("10.0.0.1", True, [6379, 8265])
    assert used.status == WARN and "6379 and 8265 in use" in used.found
    assert checks.connections_check("a", [], 3).status == PASS
    blocked = checks.connections_check("a", ["b"], 3)
    assert blocked.status == FAIL and blocked.found == "cannot connect to b"


@pytest.mark.parametrize(("cpus", "status"), [(0, FAIL), (1, WARN), (8, PASS)])
def test_cluster_has_cpus_for_data_and_a_worker(cpus: int, status: str) -> None:
    assert checks.resources_check(2, cpus, 0, may_grow=False).status == status
    assert checks.resources_check(2, cpus, 0, may_grow=True).status == PASS
