"""Training survives the loss of hosts and networks; `benchmarks.hosts` measures how long that takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.exactness import HISTORY_TOLERANCE
from tests.support import three_hosts
from tests.support.hosts import is_possible

IN_EVERY_RUN = "a host cut off for 20 s"


@pytest.mark.skipif(not is_possible(), reason="network namespaces need root and /dev/net/tun")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == IN_EVERY_RUN else [pytest.mark.exhaustive]) for name in three_hosts.FAULTS],
)
def test_history_is_that_of_undisturbed_run(name: str, tmp_path: Path) -> None:
    three_hosts.write_data(str(tmp_path))
    recovery = three_hosts.suffer(name, str(tmp_path))
    expected = three_hosts.undisturbed(str(tmp_path))
    assert three_hosts.differs_by(recovery, expected) <= HISTORY_TOLERANCE
