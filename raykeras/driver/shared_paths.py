"""Whether the nodes of a cluster find local paths, asked before workers start: only shared folders are on all nodes."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from raykeras.checkpoint.store import RunFolder
from raykeras.core.errors import OptionError
from raykeras.data.sources.base import OpenSource
from raykeras.driver.nodes import ask, other_nodes


def check_storage(folder: RunFolder) -> None:
    """Refuse storage that other nodes do not find.

    Args:
        folder: The run's folder, which need not exist.

    Raises:
        OptionError: The folder is local, and a node of the cluster does not find a file that is written beside it.
    """
    if not folder.is_local:
        return
    # a folder that cannot be written is reported by what writes the run
    parent = next(path for path in Path(folder.path).absolute().parents if path.exists())
    with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(dir=parent, prefix=".raykeras-") as file:
        if found := _node_without([file.name]):
            raise OptionError(
                f"With workers on several nodes, `storage` must be a folder that all nodes share; got {folder.path!r}, "
                f"and node {found[0]} does not find a file that was written there. Pass a shared folder, or a URL "
                "such as `s3://bucket/runs`."
            )


def check_sources(sources: Iterable[OpenSource]) -> None:
    """Refuse sources in local files that other nodes do not find.

    Args:
        sources: Opened sources of a call.

    Raises:
        OptionError: A node of the cluster does not find a file.
    """
    ends = [path for source in sources for path in (*source.files[:1], *source.files[-1:])]
    if found := _node_without([path for path in ends if os.path.isabs(path) and os.path.exists(path)]):
        raise OptionError(
            f"In a cluster, all nodes read the files of a source; node {found[0]} does not have {found[1]!r}. Copy the "
            "files to a shared folder or an object store, or to the same path on every node."
        )


def _node_without(paths: Sequence[str]) -> tuple[str, str] | None:
    """Return the name of a node that lacks a path, and the path; None if all nodes that answer have all paths."""
    for node, missing in ask(other_nodes() if paths else [], _missing, list(paths)):
        if missing:
            return node["NodeManagerHostname"], missing[0]
    return None


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]
