"""An example of the values in a checkpoint's `train_state.json`."""

from __future__ import annotations

from typing import Any

STATE: dict[str, Any] = {
    "epoch": 1,
    "step": 0,
    "logs": {},
    "step_logs": {},
    "position": {"num_rows": 75, "num_shards": 4, "window_rows": 25, "order": "shuffled"},
    "signature": {"keras": "keras", "variables": ["kernel [8, 3]"], "optimizer": "Adam", "options": {"beta_1": 0.9}},
    "keras": {"package": "keras", "version": "3.15.1"},
    "stopped": False,
    "extra": ["callbacks"],
    "callbacks": {"raykeras": "dict", "keys": ["wait"], "values": [{"raykeras": "tuple", "items": [1]}]},
}
