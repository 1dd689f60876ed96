"""The pictures of the documentation: real output, shown in Chromium.

    python -m tests.support.screenshots           # all of them; two minutes
    python -m tests.support.screenshots reports   # of terminal, notebook, reports, tensorboard and docs, those named

Needs the extras `test` and `docs`, and the packages chromium and chromium-driver.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import html
import itertools
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.chromium import Browser, chromium
from tests.support.record_runs import ROOT, RUNS

IMAGES = ROOT / "docs" / "images"
PAGES = Path(__file__).with_name("screenshot_pages")
RUN = "crashes"

RAYKERAS = [sys.executable, "-m", "raykeras.cli.main"]

_TIMEOUT_S = 180
_SHOW_ALL_VALUES = """
const boxes = [...document.querySelectorAll("mat-checkbox")];
boxes.find((box) => box.innerText.includes("Ignore outliers")).querySelector("input").click();
document.querySelector("[aria-label='Close side pane']").click();
"""
_TAGS = ("epoch_loss", "epoch_auc", "epoch_learning_rate", "rows_per_second")
_FIT = ["fit", f"{RUN}.py", "--name", RUN]

_CELLS = (
    """import raykeras as rk
from crashes import pipeline

crashes = pipeline()
crashes.train""",
    "result = rk.fit(crashes.model, crashes.train, **crashes.fit)",
)
_CELLS_SHOWN_AT = re.compile(r"Epoch 4/5: \S+ [789]\d/120")
_SCREEN_SHOWN_AT = re.compile(r"Epoch 3/5: \S+ [789]\d/120")


def terminal(browser: Browser, folder: Path) -> None:
    """Show the progress of a run on terminals of two widths."""
    for width in (80, 120):
        screen = fit_in_terminal(folder, width)
        page = folder / "terminal.html"
        page.write_text((PAGES / "terminal.html").read_text().replace("SCREEN", screen))
        browser.open(page, width=1280)
        take(browser, f"terminal-{width}", "pre")


def fit_in_terminal(folder: Path, width: int) -> str:
    """Train the run in a terminal, and return its screen in the middle of an epoch as HTML."""
    import pyte

    shutil.rmtree(folder / "runs" / RUN, ignore_errors=True)
    shutil.copy(ROOT / "tests" / "support" / "watched_pipeline.py", folder / f"{RUN}.py")
    screen = pyte.Screen(width, 30)
    stream = pyte.Stream(screen)
    stream.feed(f"$ raykeras {' '.join(_FIT)}\r\n")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    process = subprocess.Popen(
        [*RAYKERAS, *_FIT],
        cwd=folder,
        env={**environment(), "TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    decoder = codecs.getincrementaldecoder("utf-8")()
    shown = ""
    with contextlib.suppress(OSError):  # the terminal is closed
        while data := os.read(ours, 1 << 16):
            stream.feed(as_of_user(decoder.decode(data), folder))
            if not shown and any(map(_SCREEN_SHOWN_AT.match, screen.display)):
                shown = screen_html(screen)
    if process.wait(_TIMEOUT_S) or not shown:
        raise RuntimeError("\n".join(screen.display))
    return shown


def screen_html(screen: Any) -> str:
    """Return the characters of a terminal's screen with their colours."""
    lines = []
    for row in range(screen.lines):
        characters = [screen.buffer[row][column] for column in range(screen.columns)]
        groups = itertools.groupby(characters, key=lambda character: character.fg)
        spans = [(color, html.escape("".join(character.data for character in group))) for color, group in groups]
        lines.append("".join(f'<span class="{color}">{text}</span>' for color, text in spans))
    last = max(row for row, text in enumerate(screen.display) if text.strip())
    return "\n".join(lines[: last + 1])


def notebook(browser: Browser, folder: Path) -> None:
    """Show a source and a run in a notebook, in a light and a dark theme."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    shutil.copy(ROOT / "tests" / "support" / "watched_pipeline.py", folder / f"{RUN}.py")
    cells = []
    for number, (code, output) in enumerate(zip(_CELLS, outputs(folder), strict=True), 1):
        source = highlight(code, PythonLexer(), HtmlFormatter(noclasses=True, nobackground=True))
        cells.append(f'<b class="in">[{number}]:</b>{source}<b class="out">[{number}]:</b><div>{output}</div>')
    page = folder / "notebook.html"
    page.write_text((PAGES / "notebook.html").read_text().replace("CELLS", "".join(cells)))
    browser.open(page, width=1000)
    take(browser, "notebook", "main")


def outputs(folder: Path) -> Iterator[str]:
    """Run the cells in a Jupyter kernel, and yield the output of each; of the last one, while it runs."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(cwd=str(folder), env=environment())
    shown = ""

    def show(message: dict[str, Any]) -> None:
        nonlocal shown
        content = message["content"]
        text = content.get("data", {}).get("text/html", "") or "\n".join(content.get("traceback", ()))
        if text and not _CELLS_SHOWN_AT.search(shown):
            shown = as_of_user(text, folder)

    try:
        for code in _CELLS:
            reply = client.execute_interactive(code, output_hook=show, timeout=_TIMEOUT_S)
            if reply["content"]["status"] != "ok":
                raise RuntimeError(shown)
            yield shown
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def reports(browser: Browser, folder: Path) -> None:
    """Show the report of one run and of two, wide and narrow, light and dark."""
    runs = ["runs/two-workers", "runs/one-worker"]
    for run in runs:
        shutil.copytree(RUNS / Path(run).name, folder / run)
    for shown, name, width, dark, height in (
        (runs[:1], "report-wide-light", 1280, False, 1760),
        (runs, "report-wide-dark", 1280, True, 1760),
        (runs, "report-narrow-dark", 390, True, 1800),
    ):
        subprocess.run([*RAYKERAS, "report", *shown], cwd=folder, env=environment(), check=True)
        page = folder / "report.html"
        page.write_text(as_of_user(page.read_text(), folder))
        browser.open(page, width=width, dark=dark)
        browser.screenshot(IMAGES / f"{name}.png", width=width, height=height)
        shrink(IMAGES / f"{name}.png")


def tensorboard(browser: Browser, folder: Path) -> None:
    """Show the scalars of the run in TensorBoard."""
    if not (folder / "runs" / RUN).exists():
        fit_in_terminal(folder, 120)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*RAYKERAS, "tensorboard", f"runs/{RUN}", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/"
        wait_for(lambda: answers(url))
        pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in _TAGS])
        browser.open(f"{url}?smoothing=0&pinnedCards={urllib.parse.quote(pinned)}#timeseries", width=1280)
        wait_for(lambda: browser.run("return document.querySelectorAll('scalar-card line-chart').length") >= len(_TAGS))
        browser.run(_SHOW_ALL_VALUES)
        time.sleep(3)  # the charts are laid out and drawn again
        browser.screenshot(IMAGES / "tensorboard.png", width=1280, height=900)
        shrink(IMAGES / "tensorboard.png")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


_STILL = "*, *::before, *::after { transition: none !important; animation: none !important }"


def docs(browser: Browser, folder: Path) -> None:
    """Show the start page of the documentation site, as `make docs` builds it."""
    site = folder / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, env={**environment(), "NO_MKDOCS_2_WARNING": "1"}, check=True)
    browser.open(site / "index.html", width=1280)
    browser.run(
        "document.head.append(Object.assign(document.createElement('style'), {textContent: arguments[0]}))", _STILL
    )
    browser.screenshot(IMAGES / "docs-start.png", width=1280, height=900)
    shrink(IMAGES / "docs-start.png")


def as_of_user(text: str, folder: Path) -> str:
    """Return output with a user's folders instead of this machine's."""
    return text.replace(str(folder), "/home/user").replace(str(ROOT), "/home/user/raykeras")


def environment() -> dict[str, str]:
    """Return the environment of a process that runs in another folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def take(browser: Browser, name: str, selector: str) -> None:
    """Write a picture of an element."""
    box = browser.run(f"const box = document.querySelector('{selector}').getBoundingClientRect(); return box.toJSON()")
    path = IMAGES / f"{name}.png"
    browser.screenshot(path, width=round(box["width"]), height=round(box["height"]))
    shrink(path)


def shrink(path: Path) -> None:
    """Reduce a picture to 256 colours."""
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.5)


def answers(url: str) -> bool:
    """Return whether a server answers."""
    try:
        urllib.request.urlopen(url).close()
    except OSError:
        return False
    return True


PICTURES = {function.__name__: function for function in (terminal, notebook, reports, tensorboard, docs)}


def main() -> None:
    """Take the named pictures, or all."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for name in sys.argv[1:] or PICTURES:
            PICTURES[name](browser, Path(folder))


if __name__ == "__main__":
    main()
