"""One pass of a model's stages over a step's tokens, to a depth: what `flyray bench layers` times."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...actors.exchange import Exchange, ExchangePoint
from ...actors.model.stages import ModelStages, Routing
from ...kernels.protocol import Graph, Kernels, PagedBatch


class WatchedStages(ModelStages):
    """Stages that keep what the gate chose in every layer, [T, K] int32 each, while `chosen` is a list."""

    chosen: list[Tensor] | None = None

    def gate(self, layer: int, hidden: Tensor) -> Routing:
        routing = super().gate(layer, hidden)
        if self.chosen is not None:
            self.chosen.append(routing.ids.clone())
        return routing


class ModelPass:
    """All stages of a step but sampling, in the order of a colocated program."""

    def __init__(self, stages: WatchedStages, exchange: Exchange) -> None:
        self._stages, self._exchange, self._step = stages, exchange, 0

    def run(self, tokens: Tensor, paged: PagedBatch, depth: int, last: Tensor | None = None) -> Tensor:
        """tokens [T] int64 through the first `depth` layers -> logits of rows `last` [S] int64, or of all."""
        stages, self._step = self._stages, self._step + 1
        self._exchange.begin_step(self._step)
        hidden = stages.embed(tokens)
        for layer in range(depth):
            hidden = stages.attention(layer, hidden, paged)
            hidden = self._moe(layer, hidden) if layer in stages.config.moe_layers else stages.dense(layer, hidden)
        return stages.head(hidden if last is None else stages.take(hidden, last))

    def chosen(self, tokens: Tensor, paged: PagedBatch, depth: int) -> Tensor:
        """The experts that a pass chooses: [MoE layers, T, K] int32."""
        self._stages.chosen = found = []
        self.run(tokens, paged, depth)
        self._stages.chosen = None
        return torch.stack(found)

    def _moe(self, layer: int, hidden: Tensor) -> Tensor:
        stages, exchange, point = self._stages, self._exchange, ExchangePoint(self._step, layer, 0)
        routing = stages.gate(layer, hidden)
        sent = exchange.dispatch(point, routing.activations, routing.ids)
        shared = stages.shared(layer, routing)
        received = exchange.receive_dispatch(point)
        outputs = stages.experts(layer, received.activations, received.pair_token, received.pair_expert)
        exchange.send_back(point, received, outputs)
        slots = exchange.receive_combined(point, sent)
        return stages.combine(layer, hidden, slots, routing.weights, shared)


class Repeated:
    """A function of kernels that is run again and again: as one graph where `captures`, else by itself."""

    def __init__(
        self, kernels: Kernels, run: Callable[[], Tensor], captures: bool, beside: Repeated | None = None
    ) -> None:
        """beside: one that never runs at the same time, whose memory this one shares."""
        self.graph: Graph[Tensor] | None = None
        self._run = run
        if captures:
            self.graph = kernels.capture(run, None if beside is None else beside.graph)
        self.result = run() if self.graph is None else self.graph.result

    def again(self) -> None:
        if self.graph is None:
            self.result = self._run()
        else:
            self.graph.replay()
