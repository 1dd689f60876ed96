"""Adds the pages outside `docs/` to the site, makes links work there, and writes the Markdown that `llms.txt` names."""

from __future__ import annotations

import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File

import raykeras
from raykeras.cli.main import main

ROOT = Path(__file__).parents[1]

OUTSIDE = {
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "CHANGELOG.md": "changelog.md",
}
"""Pages outside `docs/`, by their path in the repository, and where the site has them."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages outside `docs/`."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links between files of the repository to links between pages of the site."""
    here = page.file.src_uri
    source = next((path for path, name in OUTSIDE.items() if name == here), f"docs/{here}")
    return _with_links_of_site(markdown, source, here)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Write the Markdown of a page beside it, with docstrings and help in place of directives."""
    markdown = re.sub(r"^::: raykeras\.(\w+)$", lambda match: _docstrings(match[1]), page.markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^::: mkdocs-click\n(    .*\n?)*", lambda _: "\n".join(_help()), markdown, flags=re.MULTILINE)
    target = Path(config.site_dir, page.file.src_uri)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(markdown)
    return output


def on_post_build(config: Any) -> None:
    """Make the links of `llms.txt` work on the site."""
    text = Path(config.docs_dir, "llms.txt").read_text()
    Path(config.site_dir, "llms.txt").write_text(_with_links_of_site(text, "docs/llms.txt", "llms.txt"))


def _with_links_of_site(markdown: str, source: str, here: str) -> str:
    """Return the Markdown of a file of the repository with links that work where the site has it."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}"

    return re.sub(r"\]\(([\w./-]+\.md)\b", link, markdown)


def _docstrings(name: str) -> str:
    """Return the signatures and docstrings of a public name and its methods."""
    public = getattr(raykeras, name)
    members = vars(public).items() if isinstance(public, type) else ()
    methods = {f"{name}.{key}": value for key, value in members if key[0] != "_" and inspect.isfunction(value)}
    signed = {name: public} | methods
    texts = [f"{key}{_signature(value)}\n\n{inspect.getdoc(value)}" for key, value in signed.items()]
    return f"## {name}\n\n" + "\n\n".join(f"```text\n{text}\n```" for text in texts)


def _signature(public: Any) -> inspect.Signature:
    """Return the signature of a function or class without annotations; docstrings say the types."""
    signature = inspect.signature(public)
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return inspect.Signature(parameters)


def _help() -> Iterator[str]:
    """Yield the help of each command."""
    group = click.Context(main, info_name="raykeras")
    for name in main.list_commands(group):
        command = main.get_command(group, name)
        text = click.Context(command, parent=group, info_name=name).get_help()
        yield f"## raykeras {name}\n\n```text\n{text}\n```\n"
