"""How shards and router come together: the links of an epoch, made anew for each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import ray

from .engine_config import EngineConfig
from .engine_links import EngineLinks
from .engine_shape import EngineShape
from .expert_placement import LayerPlacement
from .link import LinkKeys, LinkPlace, Links, ProcessPlace
from .shard_actor import here
from .shard_calls import ShardCalls
from .shard_group import ShardGroup
from .shard_start import ShardReport, ShardStart


@dataclass(frozen=True)
class ExpertMoves:
    """Layers whose experts are no longer where the engine's shape says. version: the last change's, 0 before any."""

    version: int = 0
    layers: tuple[tuple[int, LayerPlacement], ...] = ()


class Formation:
    """The shards' side of a router's sockets, and where its clients' socket belongs.

    reports: the shards' own, of this epoch. places: of their processes. `form` may be called again for another epoch:
    shards that have loaded their weights keep them, and what is left of the epoch before is dropped.
    """

    def __init__(self, config: EngineConfig, calls: ShardCalls) -> None:
        self.reports: tuple[ShardReport, ...] = ()
        self.places: tuple[ProcessPlace, ...] = ()
        self._config, self._calls = config, calls
        self._here = here()
        self._chosen: EngineLinks | None = None
        self._links: Links | None = None

    @property
    def local_pids(self) -> tuple[int, ...]:
        """Processes of the shards that are on this node."""
        return tuple(place.pid for place in self.places if place.node == self._here.node)

    def local_pid(self, shard: int) -> int | None:
        """The process of a shard, if it is on this node."""
        place = self.places[shard]
        return place.pid if place.node == self._here.node else None

    @property
    def client_place(self) -> tuple[LinkPlace, LinkKeys | None]:
        """Where the router binds its socket for clients, and with which keys; once it is known where the shards are."""
        assert self._chosen is not None
        return self._chosen.clients, self._chosen.client_keys

    def find(self, deadline: float) -> None:
        """Asks where the shards run, and chooses how to reach them. Raises ShardsFailed."""
        self.places = tuple(self._calls.ask("place", [()] * self._config.shards, deadline))
        transport = self._config.transport
        if self._chosen is None:
            nodes = sum(bool(node["Alive"]) for node in ray.nodes())
            self._chosen = EngineLinks.choose(transport, self._here, self.places, nodes)
        else:
            self._chosen = self._chosen.reaching(transport, self._here, self.places)

    def form(
        self,
        shape: EngineShape,
        epoch: int,
        moves: ExpertMoves,
        deadline: float,
        on_wait: Callable[[float], None] | None = None,
    ) -> ShardGroup:
        """Has the shards, which `find` has found, begin to run plans of this epoch. Raises ShardsFailed, ShardLost."""
        config, chosen = self._config, self._chosen
        assert chosen is not None
        self.leave()
        links = self._links = Links(chosen.shard_keys, config.silence_s)
        group = ShardGroup(links, chosen.router, config.shards, config.name, epoch, alike=bool(shape.tensor))
        starts = [
            (_shard_start(config, shape, epoch, moves, shard, group, chosen.place_on(place), chosen.shard_keys),)
            for shard, place in enumerate(self.places)
        ]
        addresses = self._calls.ask("open", starts, deadline)
        self.reports = tuple(self._calls.ask("start", [(addresses,)] * config.shards, deadline, on_wait))
        group.await_shards(max(deadline - time.monotonic(), 1.0))
        return group

    def leave(self, linger_ms: int = 0) -> None:
        """Closes the sockets for shards, of which nobody must use any more."""
        if self._links is not None:
            self._links.close(linger_ms)
            self._links = None

    def close(self) -> None:
        """`leave`, and removes the folder of sockets. May be called twice."""
        self.leave(linger_ms=500)
        if self._chosen is not None:
            self._chosen.close()


def _shard_start(
    config: EngineConfig,
    shape: EngineShape,
    epoch: int,
    moves: ExpertMoves,
    shard: int,
    group: ShardGroup,
    place: LinkPlace,
    keys: LinkKeys | None,
) -> ShardStart:
    return ShardStart(
        engine=config.name,
        epoch=epoch,
        shard=shard,
        model_path=config.model_path,
        precision=config.precision,
        weights=config.weights,
        int8_weights=config.int8_weights,
        int4_weights=config.int4_weights,
        backend=config.backend,
        kernel_plan=shape.kernel_plan,
        threads=config.threads_per_shard,
        placement=shape.placement,
        tensor=shape.tensor,
        moves=config.rebalance_interval_s > 0,
        moved=moves.layers,
        move=moves.version,
        kv_pages=shape.kv_pages,
        # Later epochs have the pages of the first.
        kv_memory_share=0.0 if epoch else config.kv_memory_share,
        kv_dtype=config.kv_dtype,
        prompt_attention=config.prompt_attention,
        page_size=config.page_size,
        programs=shape.programs,
        plan_address=group.addresses[shard],
        place=place,
        keys=keys,
        timeout_s=config.step_timeout_s,
        silence_s=config.silence_s,
    )
