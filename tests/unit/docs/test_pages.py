"""Links of the documentation resolve, its code compiles, and what it calls exists."""

from __future__ import annotations

import ast
import functools
import inspect
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import raykeras as rk
from tests.support.external_links import external_links, problem
from tests.support.markdown import PAGES, ROOT, anchors, links, name_of, python_blocks

MAX_IMAGE_NBYTES = 150_000

with_code = pytest.mark.parametrize("page", [page for page in PAGES if [*python_blocks(page)]], ids=name_of)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and target.is_relative_to(ROOT), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def test_images_are_used_and_small() -> None:
    used = {(page.parent / file).resolve() for page in PAGES for file, _ in links(page)}
    images = {path for path in (ROOT / "docs" / "images").iterdir() if path.suffix != ".mmd"}
    assert images <= used
    assert {path.name for path in images if path.stat().st_size > MAX_IMAGE_NBYTES} == set()


def test_site_has_every_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation


@with_code
def test_code_calls_what_exists(page: Path) -> None:
    for block in python_blocks(page):
        tree = ast.parse(block.setup + block.code, name_of(page))
        for node in ast.walk(tree):
            if is_public_name(node):
                assert node.attr in rk.__all__
            if isinstance(node, ast.Call) and is_public_name(node.func):
                keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(getattr(rk, node.func.attr)).bind(*node.args, **keywords)


def is_public_name(node: ast.AST) -> bool:
    """Return whether an expression is a name of raykeras, such as `rk.fit`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rk"


def test_llms_txt_lists_every_page() -> None:
    index = ROOT / "docs" / "llms.txt"
    lines = index.read_text().splitlines()
    assert lines[0] == "# raykeras" and lines[2].startswith("> ")
    listed = [(index.parent / file).resolve() for file, _ in links(index)]
    assert all(page.is_file() for page in listed)
    assert {page for page in PAGES if page.parent != ROOT} <= set(listed)


def test_external_links_are_checked(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("[a](http://x/page.md#top) [b](c.md)\n```\n[d](http://y)\n```\n")
    assert external_links(tmp_path / "page.md") == {"http://x/page.md"}
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}"
        assert problem(f"{site}/page.md") == ""
        assert problem(f"{site}/none.md") == "404 File not found"
        server.shutdown()
    assert "refused" in problem(f"{site}/page.md")


def test_readme_is_short_and_leads_to_the_documentation() -> None:
    readme = ROOT / "README.md"
    assert readme.stat().st_size < 8192
    assert {"docs/README.md", "docs/tutorial.md"} <= {file for file, _ in links(readme)}
