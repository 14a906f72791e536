"""One shard's way to the others: the exchange that its engine uses, from the socket to the stages that cross."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from ..kernels.protocol import AheadKernels, Kernels
from ..kernels.select import ACCELERATED
from .collective_exchange import CollectiveExchange
from .device_steps import MAX_ROWS
from .exchange import Exchange, LocalExchange
from .expert_routes import ExpertRoutes
from .gather import Gather, PartColumns
from .link import Links
from .model.config import ModelConfig
from .model.stages import ModelStages
from .shard_start import ShardStart
from .stage_actions import DataParallelActions, StageActions, TensorParallelActions
from .zmq_end import ZmqEnd
from .zmq_exchange import ZmqExchange
from .zmq_gather import ZmqGather


class ShardPeers:
    """`open`, then `form_group` before and `connect` after weights are loaded.

    routes: where experts are; None for a shard that is alone. fixed: an exchange for steps that have the same number
    of rows on all shards, for kernels that leave out what pads them (`AheadKernels.leaves_out`).
    """

    def __init__(self, start: ShardStart, routes: ExpertRoutes | None = None) -> None:
        """routes: those of the epoch before, for a shard that has experts already."""
        self.routes = routes
        self.fixed: Exchange | None = None
        self._start = start
        self._exchange: Exchange | ZmqGather = LocalExchange()

    @property
    def dropped(self) -> int:
        """Messages that were dropped so far."""
        return self._exchange.dropped

    def open(self, links: Links, model: ModelConfig) -> str:
        """Binds the socket for the other shards; returns its address ("" for a shard that is alone)."""
        start = self._start
        if len(start.placement.held) == 1:
            return ""
        alike = bool(start.tensor)
        routes = self.routes or ExpertRoutes(start.shard, start.placement, model.num_hidden_layers, start.moves, alike)
        self.routes = routes
        shape = start.engine, start.epoch, routes, model.hidden_size, start.timeout_s
        if start.backend in ACCELERATED:
            collective = self._exchange = CollectiveExchange(*shape)
            return collective.open(start.place)
        if start.tensor:
            gather = self._exchange = ZmqGather(*shape, PartColumns.of(model, start.tensor))
            return gather.open(links, start.place)
        peers = self._exchange = ZmqExchange(*shape)
        return peers.open(links, start.place)

    def form_group(self, addresses: Sequence[str], kernels: Kernels, model: ModelConfig) -> None:
        """Connects the devices of all shards, whose `open` gave these addresses, where they need it. To be done before
        weights are loaded, which takes some shards longer than others."""
        if isinstance(self._exchange, CollectiveExchange):
            self._exchange.connect(addresses, kernels.device, kernels.activation_dtype)
            if _leaves_out(kernels) and not self._start.tensor:
                self.fixed = self._exchange.fixed(MAX_ROWS, model.num_experts_per_tok)

    def connect(self, links: Links, addresses: Sequence[str], interrupts: Sequence[zmq.Socket]) -> None:
        """Connects to the sockets of the other shards, where there are any. interrupts: see `ZmqMail`."""
        if isinstance(self._exchange, ZmqEnd):
            self._exchange.connect(links, addresses, interrupts)

    def actions(self, stages: ModelStages, kernels: Kernels) -> StageActions:
        """What the program's stages do."""
        start, exchange = self._start, self._exchange
        if not start.tensor:
            assert not isinstance(exchange, ZmqGather)
            return DataParallelActions(stages, kernels, exchange)
        if isinstance(exchange, CollectiveExchange):
            columns = PartColumns.of(stages.config, start.tensor)
            gather: Gather = exchange.gather(columns, _leaves_out(kernels))
        else:
            assert isinstance(exchange, ZmqGather)
            gather = exchange
        return TensorParallelActions(stages, kernels, gather, start.answers)

    def abort(self) -> None:
        """Has collectives fail that wait for a shard that is gone; from another thread than that of the steps."""
        if isinstance(self._exchange, CollectiveExchange):
            self._exchange.abort()

    def close(self) -> None:
        """Ends the group; sockets close with their links."""
        if isinstance(self._exchange, CollectiveExchange):
            self._exchange.close()


def _leaves_out(kernels: Kernels) -> bool:
    return isinstance(kernels, AheadKernels) and kernels.leaves_out
