"""The Ray Serve application: an engine replica and the front replicas that speak HTTP for it.

Serve places, health-checks and restarts both. Tokens never pass through Serve: a front asks its engine replica for the
router's address once, over a handle, and talks to the router itself.
"""

# Annotations stay objects here: Serve rebuilds the routes' signatures, and FastAPI could not resolve names in them.

import asyncio
import contextlib
import math
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import Response
from ray import serve
from ray.serve.handle import DeploymentHandle

from .config import FlyrayConfig
from .front.engine_link import EngineAddress, EngineLink, NoEngineComes
from .front.errors import EngineUnavailable, RequestError
from .front.http import HttpFront, error_response
from .front.metrics import FrontMetrics
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .engine import Engine

APPLICATION = "flyray"
ENGINE = "EngineReplica"
FRONT = "Front"

# Requests are limited by `serve.max_queue`, which answers with a 429; Serve's own limit must not come first.
_MAX_ONGOING = 100_000


@dataclass(frozen=True)
class EngineState:
    """How an engine is. stage: "starting", "ready", or "failed" with an `error`, also after it was ready.

    for_good: no engine will take its place. address: when it is ready. read and total: bytes of weights, of all shards.
    seconds: of the start, so far.
    """

    stage: str
    error: str
    for_good: bool
    address: EngineAddress | None
    precision_plan: tuple[str, ...]
    golden: str
    read: int
    total: int
    seconds: float

    def seconds_left(self, last_start: float) -> int | None:
        """About how long until one is ready: by the last start's time, or by the weights read so far; None: unknown."""
        done = self.seconds if self.stage == "starting" else 0.0
        whole = last_start or (done * self.total / self.read if self.read else 0.0)
        return max(math.ceil(whole - done), 1) if whole else None


class EngineReplica:
    """Holds an engine: the router in this process, the shards in the replica's placement group."""

    def __init__(self, config: FlyrayConfig) -> None:
        """Returns at once; the engine starts in a thread, so that Serve and fronts start beside it."""
        self._config = config
        self._begin = time.monotonic()
        self._engine: Engine | None = None
        self._error = ""
        self._stopped = False
        self._progress = (0, 0)
        self._seconds = 0.0
        self._started = threading.Event()
        threading.Thread(target=self._start, name="engine-start", daemon=True).start()

    async def state(self) -> EngineState:
        """How it is now."""
        engine = self._engine if self._started.is_set() and not self._error else None
        error = engine.error if engine else self._error
        address = None
        if engine and not error:
            longest = engine.shape.longest_sequence(engine.config)
            address = EngineAddress(engine.address, engine.keys, longest, engine.config.answers)
        return EngineState(
            stage="failed" if error else ("ready" if engine else "starting"),
            error=error,
            for_good=bool(self._error) or self._stopped,
            address=address,
            precision_plan=engine.precision_plan if engine else (),
            golden=engine.router.golden if engine else "",
            read=self._progress[0],
            total=self._progress[1],
            seconds=self._seconds or time.monotonic() - self._begin,
        )

    async def stop(self) -> None:
        """Ends the engine and its shards."""
        self._stopped = True
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)

    def check_health(self) -> None:
        """For Serve, which replaces this replica when it raises: an engine that was ready and died.

        A start that failed would fail again, so it stays for everybody to read.
        """
        if self._started.is_set() and not self._error and self._engine is not None and self._engine.error:
            raise RuntimeError(self._engine.error)

    def _start(self) -> None:
        try:
            # Imported here, since it brings torch, which the driver and the fronts need not load.
            from .engine import Engine

            engine = self._engine = Engine(self._config.engine_config())
            engine.start(lambda progress: setattr(self, "_progress", (sum(progress.read), sum(progress.total))))
        except Exception as error:  # all of it belongs to whoever asks for the state
            self._error = str(error) or type(error).__name__
        self._seconds = time.monotonic() - self._begin
        self._started.set()


_routes = FastAPI(title="flyray", docs_url=None, redoc_url=None, openapi_url=None)


@_routes.exception_handler(404)
@_routes.exception_handler(405)
async def _no_such_route(request: Request, _: Exception) -> Response:
    message = f"there is no {request.method} {request.url.path} here"
    return error_response(RequestError(message, status=404, code="not_found"))


@serve.ingress(_routes)
class Front:
    """Speaks HTTP: OpenAI's endpoints and the engine's health."""

    def __init__(self, config: FlyrayConfig, engine: DeploymentHandle) -> None:
        section = config.serve
        self._engine = engine
        self._start_seconds = 0.0
        metrics = FrontMetrics(config.model_name, serve.get_replica_context().replica_tag)
        self._link = EngineLink(
            self._find_engine,
            Tokenizer(config.model.path),
            config.model_name,
            section.default_max_tokens,
            section.max_queue,
            section.recovery_timeout_s,
            metrics,
        )
        self._http = HttpFront(self._link, config.model_name, int(time.time()), metrics)
        self._running = asyncio.ensure_future(self._link.run())

    @_routes.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await self._http.chat(request)

    @_routes.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._http.completions(request)

    @_routes.get("/v1/models")
    async def models(self) -> Response:
        return await self._http.models()

    @_routes.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        return await self._http.model(name)

    @_routes.get("/health")
    async def health(self) -> Response:
        return await self._http.health()

    @_routes.get("/metrics")
    async def metrics(self) -> Response:
        return await self._http.metrics()

    async def _find_engine(self) -> EngineAddress:
        state: EngineState = await self._engine.state.remote()
        if state.for_good:
            raise NoEngineComes(state.error)
        if state.address is None:
            raise EngineUnavailable(state.error or "the engine is starting", state.seconds_left(self._start_seconds))
        self._start_seconds = state.seconds
        return state.address

    async def __del__(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running


def application(config: FlyrayConfig) -> serve.Application:
    """The application of one engine."""
    engine = serve.deployment(
        name=ENGINE,
        max_ongoing_requests=_MAX_ONGOING,
        # The replica's own bundle holds the router's process; every shard has a bundle after it.
        placement_group_bundles=[{"CPU": 1.0}] + [config.engine_config().shard_bundle] * config.engine.shards,
        placement_group_strategy="PACK",
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=5.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(EngineReplica)
    front = serve.deployment(
        name=FRONT,
        num_replicas=config.serve.front_replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 1.0},
        graceful_shutdown_timeout_s=5.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(Front)
    return front.bind(config, engine.bind(config))
