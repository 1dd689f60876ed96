"""The versions of Python and of packages in this process, compared with those of another one.

`raykeras.driver.nodes` and `raykeras.doctor.node` send this module to nodes by value, because raykeras may be missing
there or of another version. Therefore it imports only the standard library.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass

PACKAGES = ("ray", "tensorflow", "keras", "tf_keras", "pyarrow", "numpy", "fsspec")

_MINOR = ("pyarrow", "numpy", "fsspec")


def installed_versions() -> dict[str, str | None]:
    """Return the versions of Python, raykeras and the packages that it uses; None for those that are not installed."""
    versions: dict[str, str | None] = {"Python": platform.python_version(), "raykeras": None}
    with contextlib.suppress(ImportError):
        import raykeras

        versions["raykeras"] = raykeras.__version__
    for package in PACKAGES:
        versions[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@dataclass(frozen=True)
class Difference:
    """Something of which two processes have different versions.

    Attributes:
        name: "Python", or the name of a package.
        here: The version in this process; None if it is not installed.
        there: The version in the other process; None if it is not installed.
    """

    name: str
    here: str | None
    there: str | None

    @property
    def is_minor(self) -> bool:
        """Whether the processes can work together: PyArrow, NumPy, fsspec and Python's last number may differ.

        So may a missing tf_keras, which few models need.
        """
        if self.name == "Python":
            return _minor(self.here) == _minor(self.there)
        return self.name in _MINOR or (self.name == "tf_keras" and None in (self.here, self.there))

    def __str__(self) -> str:
        return f"{self.name} {self.there or 'missing'} (here {self.here or 'missing'})"


def differences(here: Mapping[str, str | None], there: Mapping[str, str | None]) -> list[Difference]:
    """Return what differs between the versions in this process and in another one."""
    return [Difference(name, here[name], there[name]) for name in here if here[name] != there[name]]


def remedy(different: list[Difference]) -> str:
    """Return how to give the other process the versions of this one."""
    wanted = " ".join(f"{d.name}=={d.here}" for d in different if d.name != "Python" and d.here)
    return f"Install on the node: pip install {wanted}" if wanted else "Use one Python and one image on all nodes."


def _minor(version: str | None) -> list[str]:
    return (version or "").split(".")[:2]
