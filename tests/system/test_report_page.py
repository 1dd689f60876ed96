"""Reports in Chromium: drawn in light and dark, on a desktop and a phone, without network; and of a real run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from raykeras.cli.main import main
from raykeras.driver.runs import StoredRun
from raykeras.report.page import report_page, write_report
from tests.support import interrupted_run
from tests.support.chromium import BINARIES, Browser, chromium
from tests.support.record_runs import RUNS
from tests.support.stored_runs import HOSTILE, store_run

DESKTOP, PHONE = 1280, 390

needs_chromium = pytest.mark.skipif(
    None in BINARIES.values(),
    reason=f"needs {' and '.join(name for name, path in BINARIES.items() if path is None)}: "
    "apt-get install chromium chromium-driver",
)

DRAWN = """
return plots.map((plot) => {
  const box = plot.querySelector(".main-svg").getBoundingClientRect();
  const drawn = plot.querySelectorAll(".scatterlayer path, .barlayer path").length;
  return box.width > 100 && box.height > 30 && box.right <= innerWidth && drawn > 0;
})
"""
"""Whether each figure is visible and draws something."""

INVALID = """
const style = getComputedStyle(document.body);
return figures.flatMap(({ data, layout }) =>
  (Plotly.validate(colored(data, style), colored(layout, style)) ?? [])
    .filter((problem) => problem.code !== "unused" && problem.code !== "dynamic")
    .map((problem) => problem.msg));
"""
"""What Plotly does not accept in the figures."""

COLORS = """
const background = getComputedStyle(document.body).backgroundColor;
return [background, getComputedStyle(plots[0].querySelector(".xtick text")).fill];
"""
"""Colours of the page's background and of a figure's text."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the runs "digits", "wide" and one with a hostile name."""
    folder = tmp_path_factory.mktemp("runs")
    store_run(folder / "digits")
    store_run(folder / "wide", workers=4, loss=2.0)
    store_run(folder / "x<img src=x onerror='window.injected = 1'>", text=HOSTILE)
    return folder


def report(folder: Path, *runs: str) -> Path:
    """Run `raykeras report`, and return the page."""
    output = folder / "report.html"
    done = CliRunner().invoke(main, ["report", *(str(folder / run) for run in runs), "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(output)
    return output


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("runs", [["digits"], ["digits", "wide"]], ids=["one run", "two runs"])
def test_page_is_drawn_without_network(runs: list[str], width: int, dark: bool, folder: Path, browser: Browser) -> None:
    page = report(folder, *runs)
    browser.open(page, width=width, dark=dark)
    assert browser.run("return document.documentElement.scrollWidth") == width
    drawn = browser.run(DRAWN)
    assert len(drawn) == 5 + len(runs) and all(drawn)
    assert browser.run(INVALID) == []
    console, requests = browser.log()
    assert console == []
    assert {url for url in requests if not url.startswith(("data:", "blob:"))} == {page.as_uri()}


@needs_chromium
def test_figures_follow_the_colours_that_the_user_prefers(folder: Path, browser: Browser) -> None:
    browser.open(report(folder, "digits"), width=DESKTOP)
    light = browser.run(COLORS)
    browser.prefer(dark=True)
    dark = browser.run(COLORS)
    assert light[0] == "rgb(255, 255, 255)"
    assert all(before != after for before, after in zip(light, dark, strict=True))
    browser.prefer(dark=False)
    assert browser.run(COLORS) == light


@needs_chromium
def test_hostile_names_are_shown_as_text(folder: Path, browser: Browser) -> None:
    page = report(folder, "x<img src=x onerror='window.injected = 1'>", "digits")
    browser.open(page, width=DESKTOP)
    assert browser.run("return window.injected ?? null") is None
    assert browser.run("return document.querySelectorAll('img, b, a[href*=\"example.com\"]').length") == 0
    assert HOSTILE in browser.run("return Array.from(document.querySelectorAll('h3')).map((of) => of.textContent)")
    assert all(browser.run(DRAWN))
    console, requests = browser.log()
    assert console == []
    assert {url for url in requests if not url.startswith(("data:", "blob:"))} == {page.as_uri()}


@needs_chromium
def test_policy_of_the_page_stops_scripts_and_requests(folder: Path, browser: Browser) -> None:
    browser.open(report(folder, "digits"), width=DESKTOP)
    script = """
    const script = document.createElement("script");
    script.textContent = "window.injected = 1";
    document.body.append(script);
    const image = new Image();
    image.src = "https://example.com/x.png";
    return fetch("https://example.com").then(() => "fetched", () => window.injected ?? "stopped");
    """
    assert browser.run(script) == "stopped"
    console, _ = browser.log()
    assert any("Content Security Policy" in message for message in console)


@needs_chromium
def test_recorded_runs_are_drawn(folder: Path, browser: Browser) -> None:
    output = folder / "recorded.html"
    write_report([str(RUNS / "two-workers"), str(RUNS / "one-worker")], str(output))
    browser.open(output, width=PHONE)
    assert all(browser.run(DRAWN))
    assert browser.run(INVALID) == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.exhaustive  # the other tests read the record of such a run
def test_report_of_killed_run_shows_it_and_adds_up_to_the_wall_time(tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    path, wall_s = interrupted_run.make(tmp_path, epochs=4, RAY_ADDRESS=address, RAYKERAS_AUTO_CACHE_BYTES="0")
    run = StoredRun(str(path))
    run.update()
    seconds = run.state.timeline.seconds()
    assert sum(seconds.values()) == pytest.approx(wall_s, rel=0.02)
    assert {"start", "build", "steps", "validation", "checkpoints", "lost", "restart"} <= {
        name for name, value in seconds.items() if value > 0
    }
    page = report_page([str(path)], "/* Plotly */")
    assert "1 failure, 1 restart, 2 resumptions" in page
    assert "4 of 4" in page
    assert "Worker of rank 1 on " in page
    assert "Step time by worker" in page and "Mean step time of 2 workers" in page
