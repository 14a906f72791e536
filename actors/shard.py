"""One shard of an engine: loads its part of the model (`ShardModel`), reaches the others (`ShardPeers`), and then runs
step plans (`ShardLoop`).

Steps come from the router over ZeroMQ to a thread that never calls Ray; `ShardActor` is what Ray starts, asks and
stops.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import torch
import zmq

from ..kernels.protocol import Kernels
from ..kernels.select import select_kernels
from .calibration import Collector
from .checkpoint import read_config
from .expert_mover import ExpertMover
from .expert_placement import LayerPlacement
from .expert_source import expert_source
from .expert_state import ExpertReport
from .grammar import GrammarBook
from .interpreter import Interpreter
from .link import LinkError, Links
from .model.config import ModelConfig
from .overrides import Overrides
from .program_check import check
from .sequence_table import SequenceTable
from .shard_loop import ShardLoop
from .shard_model import ShardModel
from .shard_peers import ShardPeers
from .shard_start import ShardReport, ShardStart, ShardStats
from .statistics_plan import StatisticsError, StatisticsPlan
from .statistics_writer import ShardStatistics
from .waker import Waker

LEAVE_TIMEOUT_S = 10.0
"""How long a step may take to end that waits for a shard which is gone; who takes longer is started anew."""


class Shard:
    """One shard. `open`, then `start`, then steps until `stop` or the router is gone; or until `leave`, after which it
    may be opened and started again for another epoch, with the weights that it has."""

    def __init__(self) -> None:
        self._progress = (0, 0)
        self._links: Links | None = None
        self._loop: ShardLoop | None = None
        self._thread: threading.Thread | None = None
        self._model: ShardModel | None = None
        self._mover: ExpertMover | None = None
        self._peers: ShardPeers | None = None
        self._grammars: GrammarBook | None = None
        self._stopping = threading.Event()

    def open(self, start: ShardStart) -> str:
        """Binds the socket for the other shards; returns its address ("" for a shard that is alone)."""
        self._start = start
        links = self._links = Links(start.keys, start.silence_s)
        self._waker = Waker(links.context, "shard")
        peers = self._peers = ShardPeers(start, self._peers.routes if self._peers is not None else None)
        return peers.open(links, self._config())

    def start(self, addresses: Sequence[str]) -> ShardReport:
        """Loads weights, unless it has them, checks kernels and program, connects to the router and the shards at
        `addresses`, and begins to run plans. Raises what is wrong with the checkpoint, a kernel or the program."""
        begin, start, links, peers = time.monotonic(), self._start, self._links, self._peers
        if links is None or peers is None:
            raise LinkError(f"shard {start.shard} was stopped while it started")
        for program in start.programs:
            check(program)
        # Twice the same number, for the kernels and for what torch itself computes between them.
        torch.set_num_threads(start.threads)
        if self._model is None:
            self._kernels = select_kernels(start.backend, start.threads, start.kv_dtype, start.kernel_plan)
        config, kernels, bytes_read = self._config(), self._kernels, 0
        peers.form_group(addresses, kernels, config)
        model = self._model
        if model is None:
            model = ShardModel.load(start, config, kernels, self._report_progress)
            bytes_read = model.bytes_read
            self._prepare(model, kernels, peers)
            self._model = model
        if self._mover is not None:
            self._mover.settle(start.moved)
        self._interpreter = Interpreter(peers.actions(model.stages, kernels), *start.programs, fixed=peers.fixed)
        plans = links.connect(zmq.DEALER, start.plan_address, events=zmq.EVENT_DISCONNECTED)
        router_gone = plans.get_monitor_socket()
        if self._grammars is None:
            self._grammars = GrammarBook(start.model_path, config.vocab_size, start.threads)
        peers.connect(links, addresses, (self._waker.socket, router_gone))
        self._table = SequenceTable(model.kv_pages, start.page_size, self._grammars)
        loop = ShardLoop(start, plans, router_gone, self._waker, self._table, self._interpreter, self._mover)
        loop.hello()
        self._loop = loop
        self._thread = threading.Thread(
            target=loop.run, args=(kernels.device,), name=f"shard-{start.shard}", daemon=True
        )
        self._thread.start()
        return ShardReport(start.shard, model.kv_pages, bytes_read, time.monotonic() - begin, model.checks)

    def override(self, layer: int, experts: Sequence[int], path: str) -> None:
        """Reads experts of another checkpoint and keeps them aside; see `Overrides.prepare`."""
        self._overrides.prepare(layer, experts, path)

    def apply_override(self) -> None:
        """Runs what `override` read. The router sends no plan meanwhile."""
        self._overrides.apply()

    def clear_overrides(self) -> None:
        """Runs the shard's own experts again. The router sends no plan meanwhile."""
        self._overrides.clear()

    def expert_report(self) -> ExpertReport:
        """How often this shard's tokens chose each expert. For an engine of several shards."""
        assert self._peers is not None
        routes = self._peers.routes
        assert routes is not None
        longest = 0.0 if self._mover is None else self._mover.longest_s
        return ExpertReport(routes.counts.cpu().numpy().copy(), longest)

    def stage_experts(self, version: int, layer: int, placement: LayerPlacement) -> None:
        """See `ExpertMover.stage`; a later plan names the version."""
        assert self._mover is not None
        self._mover.stage(version, layer, placement)

    def discard_experts(self, version: int) -> None:
        """See `ExpertMover.discard`."""
        assert self._mover is not None
        self._mover.discard(version)

    def progress(self) -> tuple[int, int]:
        """Bytes of weights read, and how many there are; (0, 0) before that is known."""
        return self._progress

    def stats(self) -> ShardStats:
        """What the loop did so far."""
        loop, peers, shard = self._loop, self._peers, self._start.shard
        if loop is None or peers is None:
            return ShardStats(shard, 0, 0, 0, "")
        return ShardStats(shard, loop.steps, len(self._table), loop.dropped + peers.dropped, loop.error)

    def gather(self, path: str, plan: StatisticsPlan) -> None:
        """From the next step on gathers activation statistics in the folder `path`. Raises StatisticsError."""
        if any(self._stages.experts_of(layer).prepared for layer in self._stages.config.moe_layers):
            raise StatisticsError(
                f"backend {self._start.backend!r} keeps routed experts in a layout of its own, from which no "
                "statistics are gathered; run an engine with the backend 'cpu' or 'torch' for them"
            )
        self._interpreter.collector = Collector(ShardStatistics(path, plan, self._start.shard), self._kernels)

    def finish_gathering(self) -> int:
        """Between steps: has all statistics on the disk; returns the tokens of this shard's sequences in them."""
        collector, self._interpreter.collector = self._interpreter.collector, None
        if collector is None:
            raise StatisticsError(f"shard {self._start.shard} gathers no statistics")
        return collector.finish()

    def leave(self) -> None:
        """Ends the epoch, whose shards are not all there any more: the loop, sockets and collectives. What was loaded
        stays. Raises LinkError where it cannot: a step does not end, or failed by this shard's own fault."""
        loop, self._loop = self._loop, None
        fault = loop.error if loop is not None and loop.fault else ""  # what fails from here on was made to
        if self._peers is not None:
            self._waker.wake()
            self._peers.abort()
        self._end(LEAVE_TIMEOUT_S)
        if fault:
            raise LinkError(f"shard {self._start.shard}: {fault}")

    def stop(self) -> None:
        """Ends the loop and closes the sockets. May be called at any time, and twice."""
        self._stopping.set()
        self._end(None)

    def _end(self, timeout_s: float | None) -> None:
        """Raises LinkError if the loop goes on for longer."""
        links, self._links = self._links, None
        if links is None:
            return
        if self._thread is not None:
            self._waker.wake()
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise LinkError(f"shard {self._start.shard}: its step does not end within {timeout_s:g} s")
            self._thread = None
        self._waker.close()
        if self._peers is not None:
            self._peers.close()
        links.close()

    def _config(self) -> ModelConfig:
        return ModelConfig.from_dict(read_config(self._start.model_path))

    def _prepare(self, model: ShardModel, kernels: Kernels, peers: ShardPeers) -> None:
        """All that changes what was loaded."""
        start, routes, stages = self._start, peers.routes, model.stages
        self._stages = stages
        self._overrides = Overrides(stages, kernels, start.page_size, start.threads)
        if start.moves and routes is not None:
            kind = start.model_path, start.weights, stages.config, start.precision
            self._mover = ExpertMover(stages, routes, expert_source(*kind, kernels, start.threads))

    def _report_progress(self, done: int, total: int) -> None:
        self._progress = done, total
        if self._stopping.is_set():
            raise LinkError(f"shard {self._start.shard} was stopped while it loaded weights")
