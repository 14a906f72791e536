"""Starts an engine's shards, checks what they compute, and runs their steps until it is stopped; brings shards that are
lost together again with the others."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from .client_port import ClientPort
from .engine_config import FLUSH_TIMEOUT_S, EngineConfig
from .engine_error import EngineError
from .engine_shape import EngineShape
from .expert_balancer import ExpertBalancer
from .expert_placement import LayerPlacement
from .formation import ExpertMoves, Formation
from .golden import GoldenClient, compare_scores, reference_scores, run_golden
from .link import LinkKeys, Links
from .micro_batches import MicroBatchChoice
from .recovery import Recovery, Restarts
from .router_loop import RouterLoop
from .scheduler import Scheduler
from .shard_calls import ShardCalls
from .shard_group import ShardGroup, ShardLost
from .shard_start import ShardReport
from .statistics_plan import StatisticsError
from .statistics_writer import StatisticsFolder

STOP_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartProgress:
    """Bytes of weights that each shard has read, and how many there are for it (0: not known yet)."""

    read: tuple[int, ...]
    total: tuple[int, ...]


class Router:
    """The router of one engine, in the process that made its shards.

    golden: a line on the golden prompt.

    `start` returns when the engine takes requests; then `address` and `keys` are what a client needs. Steps and
    clients' messages are handled in a thread of their own. When a shard is lost, what runs waits until it has come back
    (`Recovery`); an engine that fails stays failed. Statistics and overridden experts would be lost with a shard: an
    engine that has any fails then.
    """

    def __init__(
        self, config: EngineConfig, shape: EngineShape, shards: Sequence[Any], renew: Callable[[int], Any]
    ) -> None:
        """shards: handles of `ShardActor`, in shard order; they stay the caller's to end. renew: as in `Recovery`."""
        if len(shards) != config.shards:
            raise ValueError(f"shards: {len(shards)} actors for an engine of {config.shards} shards")
        self.config = config
        self.shape = shape
        self.address = ""
        self.keys: LinkKeys | None = None
        self.golden = ""
        self._calls = ShardCalls(shards, config.start_timeout_s)
        self._formation = Formation(config, self._calls)
        restarts = Restarts(config.shard_restarts)
        self._recovery = Recovery(self._calls, self._formation, renew, restarts, config.start_timeout_s)
        self._golden_identity = secrets.token_hex(16).encode()
        self._loop: RouterLoop | None = None
        self._thread: threading.Thread | None = None
        self._client_links: Links | None = None
        self._statistics: StatisticsFolder | None = None
        self._overridden = False
        self._balancer: ExpertBalancer | None = None
        self._placements: tuple[LayerPlacement, ...] = (shape.placement,) * len(shape.model.moe_layers)

    @property
    def ready(self) -> bool:
        """Whether the engine takes requests."""
        return self._loop is not None and self._loop.ready and not self._loop.error

    @property
    def error(self) -> str:
        """Why the engine does not take requests any more; empty while it does."""
        return "" if self._loop is None else self._loop.error

    @property
    def recovering(self) -> str:
        """Which shard the engine waits for, while it takes requests; empty while it runs."""
        return "" if self._loop is None else self._loop.recovering

    @property
    def epoch(self) -> int:
        """How often the shards have come together before."""
        return self._recovery.epoch

    @property
    def reports(self) -> tuple[ShardReport, ...]:
        """The shards' own, once they are loaded."""
        return self._formation.reports

    @property
    def local_pids(self) -> tuple[int, ...]:
        """Processes of the shards that are on this node."""
        return self._formation.local_pids

    def local_pid(self, shard: int) -> int | None:
        """The process of a shard, if it is on this node."""
        return self._formation.local_pid(shard)

    def start(self, on_progress: Callable[[StartProgress], None] | None = None) -> None:
        """Starts the shards and checks the golden prompt; `on_progress` is called while weights are read.

        Raises EngineError, or StatisticsError for a folder that cannot take statistics, after closing all that was
        opened.
        """
        deadline = time.monotonic() + self.config.start_timeout_s
        try:
            if self.shape.statistics is not None:
                self._statistics = StatisticsFolder(self.config.statistics, self.shape.statistics)
            with ThreadPoolExecutor(1) as pool:
                longest = self.shape.longest_sequence(self.config)
                reference = pool.submit(reference_scores, self.config, self.shape.model, longest)
                self._start_shards(deadline, on_progress)
                self._check_golden(reference.result(), longest, deadline)
            self._open(deadline)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the loop and the shards' loops and removes the sockets. May be called twice, and after a failure.

        Statistics are complete when it returns; after a failure they stay incomplete.
        """
        self._recovery.stop()
        if self._loop is not None and self._thread is not None:
            self._loop.stop()
            self._thread.join()
            self._thread = None
        if self._balancer is not None:
            self._balancer.stop()
        folder, self._statistics = self._statistics, None
        if folder is not None:
            self._finish_statistics(folder)
        # A shard that is dead already has nothing to stop; one that hangs is the caller's to kill.
        stopping = [shard.stop.remote() for shard in self._calls.handles]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
        if self._client_links is not None:
            self._client_links.close(linger_ms=500)
            self._client_links = None
        self._formation.close()

    def abandon_statistics(self) -> None:
        """`stop` will not complete them."""
        folder, self._statistics = self._statistics, None
        if folder is not None:
            folder.close()

    def override_experts(self, layer: int, experts: Sequence[int], path: str) -> None:
        """See `Engine.override_experts`. A shard that cannot read them leaves all shards as they were."""
        loop, model = self._running_loop(), self.shape.model
        if self.shape.statistics is not None:
            raise EngineError(
                f"statistics: this engine gathers them in {self.config.statistics}, of its own experts alone; override "
                "experts of an engine that gathers none"
            )
        if self.config.rebalance_interval_s:
            raise EngineError(
                f"rebalance_interval_s: this engine moves its experts every {self.config.rebalance_interval_s:g} s; "
                "override experts of an engine that leaves them where they are"
            )
        if layer not in model.moe_layers:
            raise EngineError(f"layer {layer} has no routed experts, {model.moe_layers} have")
        unknown = [expert for expert in experts if expert not in range(model.n_routed_experts)]
        if unknown or not experts:
            raise EngineError(f"experts {unknown or 'of none'}: layer {layer} has 0..{model.n_routed_experts - 1}")
        with loop.hold():
            self._overridden = True
            self._calls.ask_all("override", layer, tuple(experts), path)
            self._change(loop, "apply_override")

    def clear_overrides(self) -> None:
        """See `Engine.clear_overrides`."""
        loop = self._running_loop()
        with loop.hold():
            self._change(loop, "clear_overrides")
            self._overridden = False

    def pause(self) -> ExpertMoves:
        """For `Recovery`: stops moving experts, and says where they are."""
        loop, layers = self._running_loop(), self.shape.model.moe_layers
        if self._balancer is not None:
            self._balancer.stop()
            self._placements = self._balancer.placements
        moved = zip(layers, self._placements, strict=True)
        return ExpertMoves(loop.placement, tuple(each for each in moved if each[1] != self.shape.placement))

    def resume(self, shards: ShardGroup, epoch: int) -> None:
        """For `Recovery`: goes on with these shards."""
        loop = self._running_loop()
        loop.resume(shards, epoch)
        self._balance(loop)

    def fail(self, reason: str) -> None:
        """For `Recovery`: ends all requests and takes no more."""
        if self._loop is not None:
            self._loop.fail(reason)

    def _lost(self, lost: ShardLost) -> bool:
        """Called by the loop. Begins to bring the shards together again; False where that would not be the engine that
        it was, or is not wanted."""
        if self.shape.statistics is not None or self._overridden or not self.config.shard_restarts:
            return False
        self._recovery.begin(lost, self, self.shape)
        return True

    def _running_loop(self) -> RouterLoop:
        if self._loop is None or not self.ready:
            raise EngineError(self.error or "the engine is still starting")
        return self._loop

    def _change(self, loop: RouterLoop, method: str) -> None:
        """Shards that do not all do it run different models: that is the end of the engine."""
        try:
            self._calls.ask_all(method)
        except EngineError as error:
            loop.fail(f"{method}: {error}")
            raise
        loop.clear_prefix_cache()

    def _start_shards(self, deadline: float, on_progress: Callable[[StartProgress], None] | None) -> None:
        config, formation = self.config, self._formation
        formation.find(deadline)
        place, keys = formation.client_place
        links = self._client_links = Links(keys)
        clients = ClientPort(links, place, config.name)
        self.address = clients.address
        self.keys = keys.for_client() if keys else None

        def on_wait(left: float) -> None:
            if on_progress is not None:
                on_progress(self._progress(left))

        group = formation.form(self.shape, self._recovery.epoch, ExpertMoves(), deadline, on_wait)
        self.shape = self.shape.with_pages([report.kv_pages for report in self.reports])
        self._run(group, clients, links)

    def _progress(self, timeout_s: float) -> StartProgress:
        try:
            pairs = ray.get([shard.progress.remote() for shard in self._calls.handles], timeout=timeout_s)
        except ray.exceptions.RayError as error:
            raise EngineError(f"a shard died while it started: {error}") from error
        return StartProgress(tuple(read for read, _ in pairs), tuple(total for _, total in pairs))

    def _run(self, group: ShardGroup, clients: ClientPort, links: Links) -> None:
        scheduler = Scheduler(self.shape.scheduler_config(self.config, self._recovery.epoch))
        self._loop = RouterLoop(
            scheduler,
            group,
            clients,
            links,
            MicroBatchChoice(self.shape.programs, self.config.shards),
            self.config.step_timeout_s,
            self.shape.precision_plan,
            self._golden_identity,
            self._lost,
            drain=self.shape.statistics is not None,
        )
        self._thread = threading.Thread(target=self._loop.run, name=f"router-{self.config.name}", daemon=True)
        self._thread.start()

    def _check_golden(self, reference: tuple[float, ...] | None, longest: int, deadline: float) -> None:
        assert self._loop is not None
        links = Links(self.keys)
        try:
            left = max(deadline - time.monotonic(), 1.0)
            client = GoldenClient(links, self.address, self._golden_identity, left)
            golden = run_golden(client, self.shape.model, longest)
        finally:
            links.close()
        if reference is None:
            self.golden = "golden prompt: equal alone and in a batch; the model is too large for the reference kernels"
        else:
            self.golden = compare_scores(golden.scores, reference)

    def _open(self, deadline: float) -> None:
        """Lets clients in. Statistics begin here, without the golden prompt."""
        assert self._loop is not None
        if self.shape.statistics is not None:
            arguments = self.config.statistics, self.shape.statistics
            self._calls.ask("gather", [arguments] * self.config.shards, deadline)
        self._balance(self._loop)
        self._loop.ready = True
        if self._loop.error:  # a shard was lost after the golden prompt's last step
            raise EngineError(self._loop.error)

    def _balance(self, loop: RouterLoop) -> None:
        """Begins to watch where tokens go, if there is more than one place."""
        layers, interval_s = self.shape.model.moe_layers, self.config.rebalance_interval_s
        if self.config.shards > 1:
            self._balancer = ExpertBalancer(self._calls.handles, loop, layers, self._placements, interval_s)
            self._balancer.start()

    def _finish_statistics(self, folder: StatisticsFolder) -> None:
        """Completes the statistics, if all shards ran every step to its end. It must not keep `stop` from going on."""
        try:
            if self._loop is None or not self._loop.stopped_whole:
                raise StatisticsError("the engine did not run to its end")
            calls = [shard.finish_gathering.remote() for shard in self._calls.handles]
            folder.complete(sum(ray.get(calls, timeout=FLUSH_TIMEOUT_S)))
        except (StatisticsError, ray.exceptions.RayError) as error:
            logger.error("%s stays incomplete: %s", folder.path, error)
        finally:
            folder.close()
