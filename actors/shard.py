"""One shard of an engine: loads its part of the weights and then runs step plans in a loop.

Steps come from the router over ZeroMQ to a thread that never calls Ray; `ShardActor` is what Ray starts, asks and
stops.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import zmq

from ..kernels.composition import KernelPlan
from ..kernels.protocol import AheadKernels
from ..kernels.select import ACCELERATED, select_kernels
from .calibration import Collector
from .checkpoint import Checkpoint, read_config
from .collective_exchange import CollectiveExchange
from .device_memory import fitting_pages
from .device_steps import MAX_ROWS
from .exchange import Exchange, LocalExchange
from .expert_mover import ExpertMover
from .expert_placement import LayerPlacement
from .expert_routes import ExpertRoutes
from .expert_source import expert_source
from .expert_state import ExpertReport
from .gather import Gather, PartColumns
from .interpreter import Interpreter, StageError
from .link import LinkError, LinkKeys, LinkPlace, Links
from .model.config import ModelConfig
from .model.kv_pages import KvPages
from .model.layer_weights import MoeWeights, ShardWeights
from .model.stages import ModelStages
from .model.tensor_slice import TensorSlice
from .overrides import Overrides
from .program_check import check
from .random_weights import random_shard
from .sequence import StageProgram
from .sequence_table import PlanError, SequenceTable
from .shard_check import check_kernels
from .shard_group import HELLO
from .stage_actions import DataParallelActions, StageActions, TensorParallelActions
from .statistics_plan import StatisticsError, StatisticsPlan
from .statistics_writer import ShardStatistics
from .step_answer import Answer
from .step_plan import NewTokens, StageTime, StepPlan, StepResult
from .weights import load_shard
from .wire import WireError, decode_as, encode
from .zmq_end import ZmqEnd
from .zmq_exchange import ZmqExchange
from .zmq_gather import ZmqGather

_INTERRUPT = "inproc://shard-interrupt"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardStart:
    """All that one shard must know. Fields of the same names as in EngineConfig mean the same.

    placement: of every layer's experts at first. tensor: every shard's slice with tensor-parallel attention, else none.
    moves: whether experts will be moved. kv_pages: as many, or at most, if kv_memory_share of the device's memory
    decides; 0 for no share. plan_address: the router's socket for this shard; place: where to bind its own.
    """

    engine: str
    epoch: int
    shard: int
    model_path: str
    precision: str
    weights: str
    int8_weights: tuple[str, ...]
    int4_weights: tuple[str, ...]
    backend: str
    kernel_plan: KernelPlan | None
    threads: int
    placement: LayerPlacement
    tensor: tuple[TensorSlice, ...]
    moves: bool
    kv_pages: int
    kv_memory_share: float
    kv_dtype: str
    page_size: int
    programs: tuple[StageProgram, ...]
    plan_address: str
    place: LinkPlace
    keys: LinkKeys | None
    timeout_s: float
    silence_s: float


@dataclass(frozen=True)
class ShardReport:
    """What a shard says when it is ready. kv_pages: in its cache. checks: a line for each kernel compared with the
    reference."""

    shard: int
    kv_pages: int
    bytes_read: int
    seconds: float
    checks: tuple[str, ...]


@dataclass(frozen=True)
class ShardStats:
    """sequences: that live on the shard. dropped: messages of another engine or epoch, or of none."""

    shard: int
    steps: int
    sequences: int
    dropped: int
    error: str


@dataclass(frozen=True)
class _Running:
    """A step on its way. times: of its stages, if they are told."""

    step: int
    answer: Answer
    times: list[StageTime]


class Shard:
    """One shard. `open`, then `start`, then steps until `stop` or the router is gone."""

    def __init__(self) -> None:
        self._progress = (0, 0)
        self._steps = 0
        self._dropped = 0
        self._error = ""
        self._on_their_way: deque[_Running] = deque()
        self._routes: ExpertRoutes | None = None
        self._mover: ExpertMover | None = None
        self._placement = 0
        self._thread: threading.Thread | None = None
        self._links: Links | None = None
        self._stopping = threading.Event()

    def open(self, start: ShardStart) -> str:
        """Binds the socket for the other shards; returns its address ("" for a shard that is alone)."""
        self._start = start
        links = self._links = Links(start.keys, start.silence_s)
        self._interrupt = links.context.socket(zmq.PULL)
        self._interrupt.bind(_INTERRUPT)
        self._table = SequenceTable(start.kv_pages, start.page_size)
        if len(start.placement.held) == 1:
            self._exchange: Exchange | ZmqGather = LocalExchange()
            return ""
        model = ModelConfig.from_dict(read_config(start.model_path))
        alike = bool(start.tensor)
        routes = ExpertRoutes(start.shard, start.placement, model.num_hidden_layers, start.moves, alike)
        self._routes = routes
        shape = start.engine, start.epoch, routes, model.hidden_size, start.timeout_s
        if start.backend in ACCELERATED:
            collective = self._exchange = CollectiveExchange(*shape)
            return collective.open(start.place)
        if start.tensor:
            gather = self._exchange = ZmqGather(*shape, PartColumns.of(model, start.tensor))
            return gather.open(links, start.place)
        peers = self._exchange = ZmqExchange(*shape)
        return peers.open(links, start.place)

    def start(self, addresses: Sequence[str]) -> ShardReport:
        """Loads weights, checks kernels and program, connects to the router and the shards at `addresses`, and begins
        to run plans. Raises what is wrong with the checkpoint, a kernel or the program."""
        begin = time.monotonic()
        start = self._start
        if self._links is None:
            raise LinkError(f"shard {start.shard} was stopped while it started")
        # Twice the same number, for the kernels and for what torch itself computes between them.
        torch.set_num_threads(start.threads)
        kernels = self._kernels = select_kernels(start.backend, start.threads, start.kv_dtype, start.kernel_plan)
        model = ModelConfig.from_dict(read_config(start.model_path))
        fixed = None
        leaves_out = isinstance(kernels, AheadKernels) and kernels.leaves_out
        if isinstance(self._exchange, CollectiveExchange):
            # Before weights are loaded, which takes some shards longer than others.
            self._exchange.connect(addresses, kernels.device, kernels.activation_dtype)
            if leaves_out and not start.tensor:
                fixed = self._exchange.fixed(MAX_ROWS, model.num_experts_per_tok)
        for program in start.programs:
            check(program)
        weights, bytes_read = self._weights(model)
        checks = check_kernels(kernels, model, weights, start.page_size)
        kv = KvPages.allocate(model, self._pages(model, weights), start.page_size, kernels)
        self._table = SequenceTable(kv.num_pages, start.page_size)
        stages = self._stages = ModelStages(model, weights, kernels, kv)
        self._overrides = Overrides(stages, kernels, start.page_size, start.threads)
        if start.moves and self._routes is not None:
            kind = start.model_path, start.weights, model, start.precision
            self._mover = ExpertMover(stages, self._routes, expert_source(*kind, kernels, start.threads))
        self._interpreter = Interpreter(self._actions(stages, leaves_out), *start.programs, fixed=fixed)
        self._plans = self._links.connect(zmq.DEALER, start.plan_address, events=zmq.EVENT_DISCONNECTED)
        self._router_gone = self._plans.get_monitor_socket()
        if isinstance(self._exchange, ZmqEnd):
            self._exchange.connect(self._links, addresses, (self._interrupt, self._router_gone))
        self._plans.send(encode(StepResult(start.engine, start.epoch, HELLO, start.shard, NewTokens(), (), (), "")))
        self._thread = threading.Thread(target=self._run, name=f"shard-{start.shard}", daemon=True)
        self._thread.start()
        return ShardReport(start.shard, kv.num_pages, bytes_read, time.monotonic() - begin, checks)

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
        assert self._routes is not None
        longest = 0.0 if self._mover is None else self._mover.longest_s
        return ExpertReport(self._routes.counts.cpu().numpy().copy(), longest)

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
        dropped = self._dropped + (self._exchange.dropped if self._links else 0)
        return ShardStats(self._start.shard, self._steps, len(self._table), dropped, self._error)

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

    def stop(self) -> None:
        """Ends the loop and closes the sockets. May be called at any time, and twice."""
        self._stopping.set()
        links, self._links = self._links, None
        if links is None:
            return
        if self._thread is not None:
            interrupt = links.context.socket(zmq.PUSH)
            interrupt.connect(_INTERRUPT)
            interrupt.send(b"")
            interrupt.close(linger=1000)
            self._thread.join()
        if isinstance(self._exchange, CollectiveExchange):
            self._exchange.close()
        links.close()

    def _actions(self, stages: ModelStages, leaves_out: bool) -> StageActions:
        """What the program's stages do. leaves_out: as in `AheadKernels`."""
        start, exchange = self._start, self._exchange
        if not start.tensor:
            assert not isinstance(exchange, ZmqGather)
            return DataParallelActions(stages, self._kernels, exchange)
        if isinstance(exchange, CollectiveExchange):
            gather: Gather = exchange.gather(PartColumns.of(stages.config, start.tensor), leaves_out)
        else:
            assert isinstance(exchange, ZmqGather)
            gather = exchange
        return TensorParallelActions(stages, self._kernels, gather, self._answers)

    @property
    def _answers(self) -> bool:
        """Whether the router hears from this shard what sequences are told."""
        return not (self._start.tensor and self._start.shard)

    def _weights(self, model: ModelConfig) -> tuple[ShardWeights, int]:
        """The shard's weights, and how many bytes were read for them."""
        start, kernels = self._start, self._kernels
        mine, rounded = start.placement.held[start.shard], (start.int8_weights, start.int4_weights)
        tensor = start.tensor[start.shard] if start.tensor else None
        if start.weights == "random":
            return random_shard(model, start.precision, mine, kernels, *rounded, tensor=tensor), 0
        checkpoint, progress = Checkpoint(start.model_path), self._report_progress
        weights = load_shard(
            checkpoint, model, start.precision, mine, kernels, progress, start.threads, *rounded, tensor=tensor
        )
        return weights, checkpoint.bytes_read

    def _pages(self, model: ModelConfig, weights: ShardWeights) -> int:
        """How many KV pages this shard has. Where experts move, one layer's may come at once, beside those there."""
        start = self._start
        if not start.kv_memory_share:
            return start.kv_pages
        page_bytes = KvPages.page_bytes(model, start.page_size, self._kernels)
        layers = [layer.mlp.experts.bytes for layer in weights.layers if isinstance(layer.mlp, MoeWeights)]
        kept = max(layers, default=0) if start.moves else 0
        return min(start.kv_pages, fitting_pages(self._kernels.device, start.kv_memory_share, page_bytes, kept))

    def _report_progress(self, done: int, total: int) -> None:
        self._progress = done, total
        if self._stopping.is_set():
            raise LinkError(f"shard {self._start.shard} was stopped while it loaded weights")

    def _run(self) -> None:
        """The loop: a plan in, a result out, until it is interrupted, the router is gone or a step fails."""
        poller = zmq.Poller()
        for socket in (self._interrupt, self._router_gone, self._plans):
            poller.register(socket, zmq.POLLIN)
        if self._kernels.device.type != "cpu":
            torch.accelerator.set_device_index(self._kernels.device.index)  # each thread has a current device
        with torch.inference_mode():
            while not self._error:
                # A device that computes is asked again and again: to sleep would take longer than the step may.
                ready = dict(poller.poll(0 if self._on_their_way else None))
                if self._interrupt in ready or self._stopping.is_set():
                    break
                if self._router_gone in ready:
                    # Nobody will call `stop` any more; Ray ends this process.
                    self._error = "the router is gone"
                    break
                if self._plans in ready:
                    self._receive_plan()
                elif self._on_their_way[0].answer.ready:
                    self._finish()
        self._plans.disable_monitor()

    def _receive_plan(self) -> None:
        start = self._start
        try:
            plan = decode_as(self._plans.recv(), StepPlan)
        except WireError:
            self._dropped += 1
            return
        if (plan.engine, plan.epoch) != (start.engine, start.epoch):
            self._dropped += 1
            return
        whole = plan.program == start.programs[0].name and not plan.trace
        follows = self._interpreter.runs_ahead and whole and self._table.can_follow(plan)
        # Beside a step on its way a second one may be begun, if it can do without the first one's tokens on the host.
        while len(self._on_their_way) > follows and not self._error:
            self._finish()
        if not self._error:
            self._begin(plan)
        if not self._error and self._on_their_way[-1].answer.ready:
            while self._on_their_way and not self._error:
                self._finish()

    def _begin(self, plan: StepPlan) -> None:
        """Begins to run a plan."""
        programs = [program.name for program in self._start.programs]
        times: list[StageTime] = []
        try:
            if plan.program not in programs:
                names = ", ".join(map(repr, programs))
                raise PlanError(f"the plan names program {plan.program!r}, this shard has {names}")
            if plan.placement != self._placement:
                self._switch(plan.placement)
            batch = self._table.apply(plan)
            traced = times if plan.trace else None
            answer = self._interpreter.begin(plan.step, batch, plan.decode_rows, traced, plan.program)
        except Exception as error:
            self._fail(plan.step, error)
            return
        if not answer.ready:
            self._table.promise(plan.step, batch)
        self._on_their_way.append(_Running(plan.step, answer, times))

    def _switch(self, version: int) -> None:
        if self._mover is None or version != self._placement + 1:
            raise PlanError(f"the plan names placement {version}, this shard is at {self._placement}")
        self._mover.apply(version)
        self._placement = version

    def _finish(self) -> None:
        """Waits for the oldest step on its way and answers the router."""
        running, start = self._on_their_way.popleft(), self._start
        try:
            answer = running.answer.wait()
        except Exception as error:
            self._fail(running.step, error)
            return
        self._table.sampled(running.step, answer.tokens)
        self._steps += 1
        tokens, scores = (answer.tokens, answer.scores) if self._answers else (NewTokens(), ())
        told = tokens, scores, tuple(running.times), ""
        self._plans.send(encode(StepResult(start.engine, start.epoch, running.step, start.shard, *told)))

    def _fail(self, step: int, error: Exception) -> None:
        """While an error is handled: it becomes the result of the step, and the loop ends."""
        start = self._start
        if not isinstance(error, StageError | PlanError):
            logger.exception("shard %d, step %d", start.shard, step)
        self._error = f"step {step}: {error}" if isinstance(error, StageError | PlanError) else repr(error)
        self._plans.send(
            encode(StepResult(start.engine, start.epoch, step, start.shard, NewTokens(), (), (), self._error))
        )
