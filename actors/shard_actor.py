"""A shard as a Ray actor, and where it runs.

Ray makes the actor, asks it to start and to stop, and watches it. The actor ends with its owner: Ray kills it when the
process that made it is gone; most often the shard's loop has seen the router's connection close by then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import ray
import ray.util

from .device_choice import ALL_GPUS_VISIBLE, device_index, masked_from_peers
from .expert_placement import LayerPlacement
from .expert_state import ExpertReport
from .link import ProcessPlace
from .shard import Shard
from .shard_start import ShardReport, ShardStart, ShardStats
from .statistics_plan import StatisticsPlan


def _take_gpu(gpus: Sequence[str], peers: bool) -> None:
    """Makes the first of these GPUs, by Ray's names, torch's current one. Raises ValueError where it cannot be, or must
    reach other shards' and they are hidden."""
    import torch

    if peers and torch.version.hip is not None and masked_from_peers():
        raise ValueError(f"RCCL cannot reach GPUs that are hidden: start Ray with {ALL_GPUS_VISIBLE[0]}=1 set")
    if torch.accelerator.is_available():  # else `select_kernels` says what is missing
        torch.accelerator.set_device_index(device_index(gpus))


def here() -> ProcessPlace:
    """Where this process runs in the Ray cluster."""
    return ProcessPlace(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid())


# Ray's type hints do not know concurrency groups.
@ray.remote(max_restarts=0, concurrency_groups={"ctl": 1, "experts": 1})  # pyright: ignore[reportCallIssue]
class ShardActor:
    """`Shard` as an actor. Methods of the group "ctl" answer while another one loads weights, or experts."""

    def __init__(self) -> None:
        self._shard = Shard()

    @ray.method(concurrency_group="ctl")
    def place(self) -> ProcessPlace:
        """Where the actor runs."""
        return here()

    def open(self, start: ShardStart) -> str:
        """See `Shard.open`."""
        return self._shard.open(start)

    def start(self, addresses: list[str]) -> ShardReport:
        """See `Shard.start`; on the GPU that Ray gave this actor, if it did."""
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        if gpus:
            _take_gpu(gpus, peers=len(addresses) > 1)
        return self._shard.start(addresses)

    def override(self, layer: int, experts: Sequence[int], path: str) -> None:
        """See `Shard.override`."""
        self._shard.override(layer, experts, path)

    def apply_override(self) -> None:
        """See `Shard.apply_override`."""
        self._shard.apply_override()

    def clear_overrides(self) -> None:
        """See `Shard.clear_overrides`."""
        self._shard.clear_overrides()

    def gather(self, path: str, plan: StatisticsPlan) -> None:
        """See `Shard.gather`."""
        self._shard.gather(path, plan)

    def finish_gathering(self) -> int:
        """See `Shard.finish_gathering`."""
        return self._shard.finish_gathering()

    @ray.method(concurrency_group="ctl")
    def expert_report(self) -> ExpertReport:
        """See `Shard.expert_report`."""
        return self._shard.expert_report()

    @ray.method(concurrency_group="experts")
    def stage_experts(self, version: int, layer: int, placement: LayerPlacement) -> None:
        """See `Shard.stage_experts`."""
        self._shard.stage_experts(version, layer, placement)

    @ray.method(concurrency_group="experts")
    def discard_experts(self, version: int) -> None:
        """See `Shard.discard_experts`."""
        self._shard.discard_experts(version)

    @ray.method(concurrency_group="ctl")
    def progress(self) -> tuple[int, int]:
        """See `Shard.progress`."""
        return self._shard.progress()

    @ray.method(concurrency_group="ctl")
    def stats(self) -> ShardStats:
        """See `Shard.stats`."""
        return self._shard.stats()

    def leave(self) -> None:
        """See `Shard.leave`."""
        self._shard.leave()

    @ray.method(concurrency_group="ctl")
    def stop(self) -> None:
        """See `Shard.stop`."""
        self._shard.stop()
