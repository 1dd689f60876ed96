"""Faults of hosts and networks in the middle of a training on three hosts: what is lost, and how long recovery takes.

    python -m benchmarks.hosts [FAULT …]

The hosts are network namespaces of this machine (`tests/support/hosts.py`), which needs root. Each run must have the
history of an undisturbed run on one worker.
"""

from __future__ import annotations

import sys
import tempfile

from benchmarks.exactness import HISTORY_TOLERANCE
from tests.support import three_hosts


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def main() -> None:
    names = sys.argv[1:] or list(three_hosts.FAULTS)
    with tempfile.TemporaryDirectory() as storage:
        three_hosts.write_data(storage)
        expected = three_hosts.undisturbed(storage)
    print("| fault | noticed after | workers restarted after | first step after | steps repeated | calls | differs |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    num_different = 0
    for name in names:
        with tempfile.TemporaryDirectory() as storage:
            three_hosts.write_data(storage)
            recovery = three_hosts.suffer(name, storage)
        difference = three_hosts.differs_by(recovery, expected)
        num_different += difference > HISTORY_TOLERANCE
        times = (recovery.detection_s, recovery.restart_s, recovery.first_step_s)
        cells = [name, *map(seconds, times), recovery.lost_steps, recovery.num_calls, f"{difference:.1e}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    raise SystemExit(num_different > 0)


if __name__ == "__main__":
    main()
