"""Check a release: what it contains, its metadata, and that it works where this repository is not.

    python -m tests.support.release    # builds in build/release

- The sdist holds what git has, and the wheel, which is built from it, the package. Their metadata is valid.
- The unit tests pass in the unpacked sdist, and all other tests can be imported there.
- The wheel is installed in a new environment. There, the commands of the tutorial run in an empty folder.
- The commands of the Dockerfile run on what it copies, and the demo on that.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support import tutorial

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "release"

NOT_IN_SDIST = {".gitignore", ".ci/run"}

_WRITTEN = r"PKG-INFO|setup\.cfg|raykeras\.egg-info/.*"
"""What setuptools adds to an sdist."""


def main() -> None:
    """Check the release of this checkout."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(FOLDER), str(ROOT)])
    (sdist,), (wheel,) = FOLDER.glob("*.tar.gz"), FOLDER.glob("*.whl")
    run([sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel)])
    tracked = set(subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).splitlines())
    same_files(sdist.name, files_of_sdist(sdist), tracked - NOT_IN_SDIST)
    same_files(wheel.name, files_of_wheel(wheel), {file for file in tracked if file.startswith("raykeras/")})
    with tempfile.TemporaryDirectory(prefix="release") as folder:
        check_sdist(sdist, Path(folder, "sdist"))
        scripts = install(wheel, Path(folder, "environment"))
        check_wheel(scripts, Path(folder, "tutorial"))
        check_dockerfile(scripts, Path(folder, "image"))
    print(f"{sdist.name} and {wheel.name} can be released")


def check_sdist(sdist: Path, folder: Path) -> None:
    """Run the unit tests in the unpacked sdist, and import all others."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {"PYTHONPATH": str(unpacked)}
    run([*pytest, "tests/unit"], unpacked, environment)
    run([*pytest, "--collect-only", "--no-summary", "-qq"], unpacked, environment)


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel in a new environment; return the folder of its commands."""
    venv.create(folder, with_pip=True)
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *constraints, str(wheel)])
    run([str(folder / "bin" / "python"), "-m", "pip", "check"])
    return folder / "bin"


def check_wheel(scripts: Path, folder: Path) -> None:
    """Check the installation, and run the commands of the tutorial in an empty folder."""
    folder.mkdir()
    run([str(scripts / "raykeras"), "doctor", "--storage", "runs"], folder, {"PYTHONPATH": ""})
    transcript = tutorial.transcript(tutorial.PAGE.read_text(), folder, scripts=scripts)
    print(transcript, flush=True)
    if not (folder / "first.html").exists():
        raise SystemExit("The tutorial must write a report; there is none.")


def check_dockerfile(scripts: Path, folder: Path) -> None:
    """Run the commands of the Dockerfile on what it copies, in an environment that has Ray already, and the demo."""
    text = (ROOT / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    folder.mkdir()
    for instruction, rest in re.findall(r"^(COPY|RUN) (.*)$", text, re.MULTILINE):
        if instruction == "COPY":
            *sources, target = [word for word in rest.split() if not word.startswith("--")]
            for source in sources:
                copy(ROOT / source, folder / target if len(sources) == 1 else folder / target / source)
        else:
            environment = {**arguments, "PATH": f"{scripts}:{os.environ['PATH']}", "PYTHONPATH": ""}
            run(["sh", "-ec", rest], folder, environment)
    run([str(scripts / "raykeras"), "fit", "pipelines/digits.py", "-s", "epochs=2"], folder, {"PYTHONPATH": ""})


def copy(source: Path, target: Path) -> None:
    """Copy a file or a folder."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def files_of_sdist(sdist: Path) -> set[str]:
    """Return the files of an sdist, without those that setuptools writes."""
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    return {file for file in files if not re.fullmatch(_WRITTEN, file)}


def files_of_wheel(wheel: Path) -> set[str]:
    """Return the files of a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {file for file in archive.namelist() if ".dist-info/" not in file}


def same_files(name: str, files: set[str], expected: set[str]) -> None:
    """Raise `SystemExit` unless an archive holds exactly the expected files."""
    if files != expected:
        missing, extra = sorted(expected - files), sorted(files - expected)
        raise SystemExit(f"{name} must hold what git has; missing: {missing}; not in git: {extra}.")


def run(command: Sequence[str], folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> None:
    """Print a command, and run it; raise `SystemExit` if it fails."""
    print("$", *command, flush=True)
    status = subprocess.run(command, cwd=folder, env={**os.environ, **(environment or {})}).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
