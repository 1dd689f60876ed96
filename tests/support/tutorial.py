"""The transcript of `docs/tutorial.md`: its files are written and its commands run in an empty folder.

    python -m tests.support.tutorial    # replaces the output of the commands in the page

A block of Python with a title is a file. In a block of the kind `console`, lines that begin with `$ ` are commands, and
the others are their output.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGE = ROOT / "docs" / "tutorial.md"


def main() -> None:
    """Write the page again."""
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(transcript(PAGE.read_text(), Path(folder)))


def transcript(page: str, folder: Path, *, scripts: Path | None = None) -> str:
    """Return the page with the output of its commands.

    Args:
        page: The text of the page.
        folder: An empty folder in which to run the commands.
        scripts: The folder of the `raykeras` command; by default, that of this environment, with this repository.

    Raises:
        CalledProcessError: If a command fails.
    """
    path = f"{scripts or os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    packages = "" if scripts else str(ROOT)
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}  # set by JAX
    place = {"cwd": folder, "env": {**environment, "PATH": path, "PYTHONPATH": packages, "COLUMNS": "100"}}

    def run(block: re.Match[str]) -> str:
        kind, title, text = block.groups()
        if title:
            (folder / title).write_text(text)
        if kind != "console":
            return block[0]
        shown = []
        for command in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
            done = subprocess.run(["bash", "-c", f"{command} 2>&1"], stdout=subprocess.PIPE, text=True, **place)
            if done.returncode:
                raise RuntimeError(f"{command}\n{done.stdout}")
            output = done.stdout.replace(str(folder), "/home/user/houses")
            shown += [f"$ {command}", *(line.rstrip() for line in output.splitlines())]
        return "\n".join(["```console", *shown, "```"])

    return re.sub(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', run, page, flags=re.MULTILINE | re.DOTALL)


if __name__ == "__main__":
    main()
