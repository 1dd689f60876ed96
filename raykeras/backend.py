"""Ray Train's backend for workers that train with TensorFlow: it sets TF_CONFIG and nothing else.

Not `ray.train.tensorflow`'s, which also sets TF_USE_LEGACY_KERAS, and imports TensorFlow in the
driver and in the controller.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


@dataclass
class TensorFlowBackendConfig(BackendConfig):
    """Selects `TensorFlowBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return TensorFlowBackend


class TensorFlowBackend(Backend):
    """Tells every worker the addresses of all."""

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_free_address)
        ray.get(
            [
                worker_group.execute_single_async(rank, _set_tf_config, addresses, rank)
                for rank in range(len(worker_group))
            ]
        )


def _free_address() -> str:
    from ray.train._internal.utils import get_address_and_port

    host, port = get_address_and_port()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    if len(addresses) > 1:
        cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
