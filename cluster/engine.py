"""Places an engine's shards on a Ray cluster, starts it, and stops it without leaving anything behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..actors.engine_config import EngineConfig
from ..actors.engine_error import EngineError
from ..actors.engine_shape import EngineShape
from ..actors.link import LinkKeys
from ..actors.router import Router, StartProgress
from ..actors.shard_actor import ShardActor
from .engine_client import EngineClient, EngineUnreachable

__all__ = ["Engine", "EngineClient", "EngineError", "EngineUnreachable", "PlacementError"]

_EXIT_TIMEOUT_S = 5.0


class PlacementError(EngineError):
    """The cluster has no room for the shards."""


def check_room(bundle: Mapping[str, float], shards: int, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises PlacementError, with the numbers, if nodes of these total resources can never hold so many bundles."""
    room = sum(min(int(node.get(name, 0.0) / amount) for name, amount in bundle.items()) for node in nodes)
    if room < shards:
        have = "; ".join(_amounts({name: node.get(name, 0.0) for name in bundle}) for node in nodes) or "no nodes"
        raise PlacementError(
            f"shards: {shards} shards of {_amounts(bundle)} each do not fit the cluster, which has room for {room} "
            f"(a node each: {have})"
        )


class Engine:
    """An engine: its shards on the cluster, its router in this process.

    Ray must be initialized. In a Serve replica with a placement group the shards take the bundles after the replica's
    own, and die with it; elsewhere the engine makes a placement group of its own.

        with Engine(config) as engine:
            client = EngineClient(engine.address, engine.keys)
    """

    def __init__(self, config: EngineConfig) -> None:
        """Reads the checkpoint's headers. Raises what `EngineShape.read` raises."""
        self.config = config
        self.shape = EngineShape.read(config)
        self._actors: list[Any] = []
        self._bundles: list[PlacementGroupSchedulingStrategy] = []
        self._pids: list[int] = []
        self._group: PlacementGroup | None = None
        self._router: Router | None = None
        self._stopped = False

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Where clients connect."""
        return self.router.address

    @property
    def keys(self) -> LinkKeys | None:
        """What clients need to connect; None where Unix sockets are used."""
        return self.router.keys

    @property
    def precision_plan(self) -> tuple[str, ...]:
        """Lines that say in which format every kind of weight is, and which kernel runs it."""
        return self.shape.precision_plan

    @property
    def router(self) -> Router:
        """The running router. Raises EngineError before `start`."""
        if self._router is None:
            raise EngineError("the engine has not been started")
        return self._router

    @property
    def error(self) -> str:
        """Why the engine does not take requests; empty while it does."""
        if self._router is None:
            return "the engine has not been started"
        return self._router.error or ("" if self._router.ready else "the engine is still starting")

    @property
    def recovering(self) -> str:
        """Which shard the engine waits for before it goes on, while it takes requests; empty while it runs."""
        return "" if self._router is None else self._router.recovering

    def start(self, on_progress: Callable[[StartProgress], None] | None = None) -> Engine:
        """Places and starts the shards; returns when requests are taken. Blocks: on an event loop, run it in a thread.

        on_progress is called while weights are read. Raises EngineError (PlacementError if there is no room); nothing
        is left running then.
        """
        if not ray.is_initialized():
            raise EngineError("Ray is not initialized; call ray.init first")
        self._stopped = False
        try:
            self._actors = self._place()
            if self._stopped:
                raise EngineError("the engine was stopped while it started")
            self._router = Router(self.config, self.shape, self._actors, self._renew)
            self._router.start(on_progress)
            self.shape = self._router.shape
        except BaseException:
            self.stop()
            raise
        return self

    def override_experts(self, layer: int, experts: Sequence[int], path: str | os.PathLike[str]) -> None:
        """From now on these experts of the layer are those of the checkpoint at `path`, in its format, on whatever
        shards hold them; other overrides stay. Blocks until all shards have read them; clients' messages wait.

        Only while no request runs, and never in an engine that gathers statistics. Raises EngineError then, for a layer
        or an expert that is not there, for a folder that lacks them, and for experts that multiply another kind of
        activations; nothing is changed.
        """
        text = str(path)
        self.router.override_experts(layer, experts, text if "://" in text else os.path.abspath(text))

    def clear_overrides(self) -> None:
        """All experts are the engine's own again. Raises EngineError while a request runs."""
        self.router.clear_overrides()

    def abandon_statistics(self) -> None:
        """Leaves the statistics that the engine gathers incomplete for good."""
        if self._router is not None:
            self._router.abandon_statistics()

    def stop(self) -> None:
        """Ends router, shards and placement group; returns when the shards' processes here have exited. May be called
        twice, after a failure, and from another thread while `start` runs, which then fails."""
        self._stopped = True
        if self._router is not None:
            self._router.stop()
            self._pids = list(self._router.local_pids)
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()
        _await_exit(self._pids)
        self._pids.clear()
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _place(self) -> list[Any]:
        replica_group = get_current_placement_group()
        first = 0
        if replica_group is not None:
            first = 1
            self._check_bundles(replica_group)
        group = replica_group or self._reserve()
        self._bundles = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=first + shard)
            for shard in range(self.config.shards)
        ]
        return [self._make(shard) for shard in range(self.config.shards)]

    def _make(self, shard: int) -> Any:
        bundle = self.config.shard_bundle
        actor: Any = ShardActor
        return actor.options(
            num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0.0), scheduling_strategy=self._bundles[shard]
        ).remote()

    def _renew(self, shard: int) -> Any:
        """Ends a shard's process, for good, and starts another in its place."""
        ray.kill(self._actors[shard])
        pid = self.router.local_pid(shard)
        if pid is not None:
            _await_exit([pid])  # its GPU's memory is free then
        self._actors[shard] = self._make(shard)
        return self._actors[shard]

    def _check_bundles(self, group: PlacementGroup) -> None:
        """The replica's group must have a bundle a shard after the replica's own."""
        need = self.config.shard_bundle
        bundles = group.bundle_specs[1:]
        fitting = [all(bundle.get(name, 0) >= amount for name, amount in need.items()) for bundle in bundles]
        if len(bundles) < self.config.shards or not all(fitting[: self.config.shards]):
            raise PlacementError(
                f"placement_group_bundles: {self.config.shards} bundles of {_amounts(need)} are needed after the "
                f"replica's own, there are {[dict(bundle) for bundle in bundles]}"
            )

    def _reserve(self) -> PlacementGroup:
        bundle = self.config.shard_bundle
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        check_room(bundle, self.config.shards, nodes)
        group = self._group = placement_group([bundle] * self.config.shards, strategy="PACK")
        if not group.wait(self.config.placement_timeout_s):
            free = ray.available_resources()
            raise PlacementError(
                f"shards: {self.config.shards} shards of {_amounts(bundle)} each found no free room within "
                f"{self.config.placement_timeout_s:g} s; the cluster has "
                f"{_amounts({name: free.get(name, 0.0) for name in bundle})} free"
            )
        return group


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _await_exit(pids: Sequence[int]) -> None:
    """Waits until processes of this node are gone, for Ray kills without waiting; one that hangs is killed here."""
    for pid in _left_after(_EXIT_TIMEOUT_S, pids):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _left_after(_EXIT_TIMEOUT_S, pids)


def _left_after(seconds: float, pids: Sequence[int]) -> list[int]:
    """Those that have not ended then; returns earlier when all have."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
