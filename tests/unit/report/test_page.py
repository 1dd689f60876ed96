"""The page of a report: what it contains, and that texts of a run stay texts."""

from __future__ import annotations

import copy
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import raykeras as rk
from raykeras.core import events
from raykeras.driver.goodput import BUCKETS
from raykeras.report.page import report_page, unique_labels, write_report
from tests.support.stored_runs import HOSTILE, store_run


def page_of(*folders: Path) -> str:
    return report_page([str(folder) for folder in folders], "/* Plotly */")


class Outline(HTMLParser):
    """Collects the tags of a page, its headings, and the text of its figures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.figures: list[dict[str, Any]] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._inside = "figures" if ("id", "figures") in attrs else tag

    def handle_data(self, data: str) -> None:
        if re.fullmatch("h[1-6]", self._inside):
            self.headings.append((self._inside, data))
        if self._inside == "figures":
            self.figures = json.loads(data)
        self._inside = ""


def test_page_has_every_section_and_the_headings_are_nested(tmp_path: Path) -> None:
    page = page_of(store_run(tmp_path / "digits"))
    outline = Outline(page)
    assert [text for level, text in outline.headings if level in ("h1", "h2")] == [
        "digits",
        "Metrics by epoch",
        "Course of the run",
        "Where the time went",
        "Step time by worker",
        "Failures and restarts",
        "Configuration",
    ]
    levels = [int(level[1]) for level, _ in outline.headings]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert ("h3", "loss") in outline.headings and ("h3", "learning rate") in outline.headings
    assert page.count("data-figure=") == len(outline.figures) == 6
    assert "1 failure, 1 restart" in page
    assert "2 of 2" in page


def test_table_of_time_adds_up(tmp_path: Path) -> None:
    page = page_of(store_run(tmp_path / "digits"))
    section = page.split("<h2>Where the time went</h2>")[1].split("</section>")[0]
    *buckets, total = re.findall(r'class="number">(?:<strong>)?([\d.]+)(?:</strong>)?</td><td class="number">', section)
    assert sum(map(float, buckets)) == pytest.approx(float(total), abs=0.005 * len(BUCKETS))


def test_two_runs_are_laid_over_each_other_and_only_differences_are_shown(tmp_path: Path) -> None:
    page = page_of(store_run(tmp_path / "a", workers=2), store_run(tmp_path / "b", workers=4))
    outline = Outline(page)
    assert ("h1", "2 runs") in outline.headings
    assert ("h2", "Differences in configuration") in outline.headings
    loss = outline.figures[0]["data"]
    assert {trace["name"] for trace in loss if "name" in trace} == {
        "a, training", "a, validation", "b, training", "b, validation",
    }  # fmt: skip
    differing = page.split("<h2>Differences in configuration</h2>")[1].split("<details>")[0]
    assert re.findall(r"<code>(.*?)</code>", differing) == ["workers"]


def test_texts_of_a_run_stay_texts(tmp_path: Path) -> None:
    page = page_of(store_run(tmp_path / "x<img src=x onerror=alert(1)>", text=HOSTILE))
    outline = Outline(page)
    assert outline.tags.count("script") == 3
    assert not {"img", "iframe", "b", "a"} & set(outline.tags)
    assert not [name for name in outline.attributes if name.startswith("on")]
    assert ("h3", HOSTILE) in outline.headings
    for name in set(re.findall(r'"(?:name|text)":"(.*?)"', json.dumps(outline.figures))):
        assert "<" not in name.replace("<br>", "")


def test_page_forbids_network_and_other_scripts(tmp_path: Path) -> None:
    page = page_of(store_run(tmp_path / "digits"))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert re.fullmatch(r"script-src( 'sha256-[\w+/=]+'){2}", policy[1].split("; ")[1])
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    page = page_of(store_run(tmp_path / "digits", loss=float("nan")))
    assert Outline(page).figures[0]["data"][0]["y"] == [None, None]


def test_run_without_events_has_a_page(tmp_path: Path) -> None:
    folder = store_run(tmp_path / "new")
    (folder / "events.jsonl").unlink()
    (folder / "run.json").unlink()
    page = page_of(folder)
    assert "No epoch has finished." in page
    assert "not started" in page


MUTATIONS = [
    None,
    True,
    -1,
    1 << 62,
    10**400,
    0.5,
    1e308,
    -1e308,
    float("nan"),
    "",
    "\x1b[2J",
    [],
    {},
    [[]],
    {"": None},
]


@given(data=st.data())
@settings(max_examples=300)
def test_tampered_log_has_a_page(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = store_run(tmp_path_factory.mktemp("runs") / "digits")
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for _ in range(data.draw(st.integers(1, 6))):
        target = data.draw(st.sampled_from(lines))
        name = data.draw(st.sampled_from(sorted(target)))
        if isinstance(target[name], dict) and target[name] and data.draw(st.booleans()):
            target, name = target[name], data.draw(st.sampled_from(sorted(target[name])))
        target[name] = copy.deepcopy(data.draw(st.sampled_from(MUTATIONS)))
    lines = data.draw(st.permutations(lines)) if data.draw(st.booleans()) else lines
    (folder / "events.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert Outline(page_of(folder)).headings[0] == ("h1", "digits")


def test_names_that_occur_twice_are_numbered() -> None:
    assert unique_labels(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_report_is_written_with_any_characters(tmp_path: Path) -> None:
    write_report([str(store_run(tmp_path / "digits", text="\ud800\x00 ünï"))], str(tmp_path / "out.html"))
    assert "ünï" in (tmp_path / "out.html").read_text(encoding="utf-8")


def test_output_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(rk.OptionError, match="path of a file that can be written"):
        write_report([str(store_run(tmp_path / "digits"))], str(tmp_path / "missing" / "out.html"))


def test_folder_without_a_run_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(rk.OptionError, match="holds no run"):
        write_report([str(tmp_path)], str(tmp_path / "out.html"))


def test_warnings_of_events_are_shown(tmp_path: Path) -> None:
    folder = store_run(tmp_path / "digits")
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(events.StorageFailed(cause="503 <Slow Down>", retry_s=2.0).as_dict()) + "\n")
    assert "503 &lt;Slow Down&gt;" in page_of(folder)
