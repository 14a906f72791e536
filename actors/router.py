"""Starts an engine's shards, checks what they compute, and runs their steps until it is stopped or a shard is lost."""

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
from .engine_links import EngineLinks
from .engine_shape import EngineShape
from .expert_balancer import ExpertBalancer
from .golden import GoldenClient, compare_scores, reference_scores, run_golden
from .link import LinkKeys, Links, ProcessPlace
from .micro_batches import MicroBatchChoice
from .router_loop import RouterLoop
from .scheduler import Scheduler
from .shard_actor import here
from .shard_group import ShardGroup
from .shard_start import ShardReport, ShardStart
from .statistics_plan import StatisticsError
from .statistics_writer import StatisticsFolder

STOP_TIMEOUT_S = 5.0
_PROGRESS_PERIOD_S = 0.2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartProgress:
    """Bytes of weights that each shard has read, and how many there are for it (0: not known yet)."""

    read: tuple[int, ...]
    total: tuple[int, ...]


class Router:
    """The router of one engine, in the process that made its shards.

    reports: the shards' own, once they are loaded. golden: a line on the golden prompt. local_pids: processes of the
    shards that are on this node.

    `start` returns when the engine takes requests; then `address` and `keys` are what a client needs. Steps and
    clients' messages are handled in a thread of their own. An engine that fails stays failed; its epoch is 0.
    """

    def __init__(self, config: EngineConfig, shape: EngineShape, shards: Sequence[Any]) -> None:
        """shards: handles of `ShardActor`, in shard order; they stay the caller's to end."""
        if len(shards) != config.shards:
            raise ValueError(f"shards: {len(shards)} actors for an engine of {config.shards} shards")
        self.config = config
        self.shape = shape
        self.epoch = 0
        self.address = ""
        self.keys: LinkKeys | None = None
        self.reports: tuple[ShardReport, ...] = ()
        self.golden = ""
        self.local_pids: tuple[int, ...] = ()
        self._shards = list(shards)
        self._golden_identity = secrets.token_hex(16).encode()
        self._loop: RouterLoop | None = None
        self._thread: threading.Thread | None = None
        self._engine_links: EngineLinks | None = None
        self._links: list[Links] = []
        self._statistics: StatisticsFolder | None = None
        self._balancer: ExpertBalancer | None = None

    @property
    def ready(self) -> bool:
        """Whether the engine takes requests."""
        return self._loop is not None and self._loop.ready and not self._loop.error

    @property
    def error(self) -> str:
        """Why the engine does not take requests any more; empty while it does."""
        return "" if self._loop is None else self._loop.error

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
        stopping = [shard.stop.remote() for shard in self._shards]
        ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
        for links in self._links:
            links.close(linger_ms=500)
        self._links.clear()
        if self._engine_links is not None:
            self._engine_links.close()

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
            self._ask_all("override", (layer, tuple(experts), path))
            self._change(loop, "apply_override")

    def clear_overrides(self) -> None:
        """See `Engine.clear_overrides`."""
        loop = self._running_loop()
        with loop.hold():
            self._change(loop, "clear_overrides")

    def _running_loop(self) -> RouterLoop:
        if self._loop is None or not self.ready:
            raise EngineError(self.error or "the engine is still starting")
        return self._loop

    def _change(self, loop: RouterLoop, method: str) -> None:
        """Shards that do not all do it run different models: that is the end of the engine."""
        try:
            self._ask_all(method, ())
        except EngineError as error:
            loop.fail(f"{method}: {error}")
            raise
        loop.clear_prefix_cache()

    def _ask_all(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Calls a method of every shard and waits for all, also if one fails. Raises EngineError."""
        calls = [getattr(shard, method).remote(*arguments) for shard in self._shards]
        _, silent = ray.wait(calls, num_returns=len(calls), timeout=self.config.start_timeout_s)
        if silent:
            names = ", ".join(f"shard {calls.index(call)}" for call in silent)
            raise EngineError(f"{names}: no answer to {method} within {self.config.start_timeout_s:g} s")
        for shard, call in enumerate(calls):
            self._check(call, f"shard {shard}", f"in {method}")

    def _start_shards(self, deadline: float, on_progress: Callable[[StartProgress], None] | None) -> None:
        config = self.config
        places = self._ask("place", [()] * config.shards, deadline)
        router = here()
        self.local_pids = tuple(place.pid for place in places if place.node == router.node)
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        chosen = self._engine_links = EngineLinks.choose(config.transport, router, places, nodes)
        shard_links, client_links = Links(chosen.shard_keys, config.silence_s), Links(chosen.client_keys)
        self._links += [shard_links, client_links]
        group = ShardGroup(
            shard_links, chosen.router, config.shards, config.name, self.epoch, alike=bool(self.shape.tensor)
        )
        clients = ClientPort(client_links, chosen.clients, config.name)
        self.address = clients.address
        self.keys = chosen.client_keys.for_client() if chosen.client_keys else None
        starts = [(self._shard_start(shard, chosen, place, group),) for shard, place in enumerate(places)]
        addresses = self._ask("open", starts, deadline)
        self.reports = tuple(self._ask("start", [(addresses,)] * config.shards, deadline, on_progress))
        self.shape = self.shape.with_pages([report.kv_pages for report in self.reports])
        group.await_shards(max(deadline - time.monotonic(), 1.0))
        self._run(group, clients, shard_links)

    def _shard_start(self, shard: int, chosen: EngineLinks, place: ProcessPlace, group: ShardGroup) -> ShardStart:
        config = self.config
        return ShardStart(
            engine=config.name,
            epoch=self.epoch,
            shard=shard,
            model_path=config.model_path,
            precision=config.precision,
            weights=config.weights,
            int8_weights=config.int8_weights,
            int4_weights=config.int4_weights,
            backend=config.backend,
            kernel_plan=self.shape.kernel_plan,
            threads=config.threads_per_shard,
            placement=self.shape.placement,
            tensor=self.shape.tensor,
            moves=config.rebalance_interval_s > 0,
            kv_pages=self.shape.kv_pages,
            kv_memory_share=config.kv_memory_share,
            kv_dtype=config.kv_dtype,
            page_size=config.page_size,
            programs=self.shape.programs,
            plan_address=group.addresses[shard],
            place=chosen.place_on(place),
            keys=chosen.shard_keys,
            timeout_s=config.step_timeout_s,
            silence_s=config.silence_s,
        )

    def _ask(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        deadline: float,
        on_progress: Callable[[StartProgress], None] | None = None,
    ) -> list[Any]:
        """Calls a method of every shard and waits for all, or for the first that fails. Raises EngineError."""
        calls = [getattr(shard, method).remote(*each) for shard, each in zip(self._shards, arguments, strict=True)]
        waiting = list(calls)
        while waiting:
            left = deadline - time.monotonic()
            if left <= 0:
                silent = ", ".join(f"shard {calls.index(call)}" for call in waiting)
                raise EngineError(f"{silent}: no answer to {method} within {self.config.start_timeout_s:g} s")
            done, waiting = ray.wait(waiting, timeout=min(left, _PROGRESS_PERIOD_S))
            for call in done:
                self._check(call, f"shard {calls.index(call)}")
            if on_progress is not None:
                on_progress(self._progress(left))
        return ray.get(calls)

    def _check(self, call: ray.ObjectRef, name: str, when: str = "while it started") -> None:
        try:
            ray.get(call)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise EngineError(f"{name}: {type(cause).__name__}: {cause}") from cause
        except ray.exceptions.RayActorError as error:
            raise EngineError(f"{name} died {when}: {error}") from error

    def _progress(self, timeout_s: float) -> StartProgress:
        try:
            pairs = ray.get([shard.progress.remote() for shard in self._shards], timeout=timeout_s)
        except ray.exceptions.RayError as error:
            raise EngineError(f"a shard died while it started: {error}") from error
        return StartProgress(tuple(read for read, _ in pairs), tuple(total for _, total in pairs))

    def _run(self, group: ShardGroup, clients: ClientPort, shard_links: Links) -> None:
        scheduler = Scheduler(self.shape.scheduler_config(self.config, self.epoch))
        self._loop = RouterLoop(
            scheduler,
            group,
            clients,
            shard_links,
            MicroBatchChoice(self.shape.programs, self.config.shards),
            self.config.step_timeout_s,
            self.shape.precision_plan,
            self._golden_identity,
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
            self._ask("gather", [(self.config.statistics, self.shape.statistics)] * self.config.shards, deadline)
        if self.config.shards > 1:
            shape, interval_s = self.shape, self.config.rebalance_interval_s
            layers = shape.model.moe_layers
            self._balancer = ExpertBalancer(self._shards, self._loop, layers, shape.placement, interval_s)
            self._balancer.start()
        self._loop.ready = True
        if self._loop.error:  # a shard was lost after the golden prompt's last step
            raise EngineError(self._loop.error)

    def _finish_statistics(self, folder: StatisticsFolder) -> None:
        """Completes the statistics, if all shards ran every step to its end. It must not keep `stop` from going on."""
        try:
            if self._loop is None or not self._loop.stopped_whole:
                raise StatisticsError("the engine did not run to its end")
            calls = [shard.finish_gathering.remote() for shard in self._shards]
            folder.complete(sum(ray.get(calls, timeout=FLUSH_TIMEOUT_S)))
        except (StatisticsError, ray.exceptions.RayError) as error:
            logger.error("%s stays incomplete: %s", folder.path, error)
        finally:
            folder.close()
