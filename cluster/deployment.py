"""The Ray Serve application: engine replicas, the front replicas that speak HTTP for them, and what runs batches.

Serve places, health-checks, restarts, scales and drains both. Tokens never pass through Serve: a front asks the engine
replicas for their routers' addresses, over a handle, and talks to the routers itself.
"""

# Annotations stay objects here: Serve rebuilds the routes' signatures, and FastAPI could not resolve names in them.

import asyncio
import contextlib
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.handle import DeploymentHandle

from ..actors.engine_config import FLUSH_TIMEOUT_S
from .config import TEMPORARY, ConfigError, FlyrayConfig, load_config
from .engine_client import EngineClient, EngineUnreachable
from .engine_roster import ServeRoster
from .engine_scaling import REQUESTS, STARTING, EngineScaling
from .engine_state import EngineAddress, EngineState
from .files.batch_store import BatchStore
from .files.http import METHODS, FilesHttp
from .files.replica import BatchReplica
from .front.api_keys import ApiKeys
from .front.cluster_view import ClusterView
from .front.engine_pool import EnginePool
from .front.errors import RequestError
from .front.gate import guard
from .front.http import HttpFront, error_response
from .front.metrics import FrontMetrics
from .page.page_files import PageFiles
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .engine import Engine

APPLICATION = "flyray"
ENGINE = "EngineReplica"
FRONT = "Front"
BATCHES = "BatchReplica"

# Requests are limited by `serve.max_queue`, which answers with a 429; Serve's own limit must not come first.
_MAX_ONGOING = 100_000
# How long fronts have to see that a replica is no longer on Serve's list before it looks whether it has requests.
_NOTICE_S = 2.0
_STOP_S = 10.0
_LOAD_PERIOD_S = 1.0
_LOAD_WINDOW_S = 3.0
_METRICS_TIMEOUT_S = 1.0


class EngineReplica:
    """Holds an engine: the router in this process, the shards in the replica's placement group."""

    def __init__(self, config: FlyrayConfig) -> None:
        """Returns at once; the engine starts in a thread, so that Serve and fronts start beside it."""
        self._config = config
        self._name = f"engine-{serve.get_replica_context().replica_id.unique_id}"
        self._begin = time.monotonic()
        self._engine: Engine | None = None
        self._client: EngineClient | None = None
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
            longest, page_size = engine.shape.longest_sequence(engine.config), engine.config.page_size
            pages = page_size if engine.config.prefix_cache else 0
            address = EngineAddress(engine.address, engine.keys, longest, engine.config.answers, pages)
        return EngineState(
            name=self._name,
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

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `EngineScaling`, by Serve, once a second."""
        return {REQUESTS: float(await self._requests()), STARTING: float(not self._started.is_set())}

    async def __del__(self) -> None:
        """Ends the engine once it has no requests, or `drain_timeout_s` is over. Serve takes this replica off its list
        first, so fronts send no more; what is left they send to another engine when this one is gone."""
        over = time.monotonic() + self._config.serve.engines.drain_timeout_s
        while time.monotonic() < over and await self._requests():
            await asyncio.sleep(_LOAD_PERIOD_S / 4)
        await self.stop()

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

    async def _requests(self) -> int:
        """Requests that run or wait; none where nobody answers."""
        engine = self._engine if self._started.is_set() and not self._stopped else None
        if engine is None or engine.error:
            return 0
        if self._client is None or self._client.address != engine.address:
            if self._client is not None:
                await self._client.close()
            self._client = EngineClient(engine.address, engine.keys)
        try:
            status = await self._client.status()
        except EngineUnreachable:
            return 0
        return status.running + status.waiting

    def _start(self) -> None:
        try:
            # Imported here, since it brings torch, which the driver and the fronts need not load.
            from .engine import Engine

            engine = self._engine = Engine(replace(self._config.engine_config(), name=self._name))
            engine.start(lambda progress: setattr(self, "_progress", (sum(progress.read), sum(progress.total))))
        except Exception as error:  # all of it belongs to whoever asks for the state
            self._error = str(error) or type(error).__name__
        self._seconds = time.monotonic() - self._begin
        self._started.set()


_routes = FastAPI(title="flyray", docs_url=None, redoc_url=None, openapi_url=None)


@_routes.exception_handler(404)
async def _no_such_route(request: Request, _: Exception) -> Response:
    message = f"there is no {request.method} {request.url.path} here"
    return error_response(RequestError(message, status=404, code="not_found"))


@_routes.exception_handler(405)
async def _no_such_method(request: Request, error: HTTPException) -> Response:
    allowed = (error.headers or {})["Allow"]
    message = f"{request.url.path} takes {allowed}, not {request.method}"
    response = error_response(RequestError(message, status=405, code="method_not_allowed"))
    response.headers["Allow"] = allowed
    return response


@serve.ingress(_routes)
class Front:
    """Speaks HTTP: OpenAI's endpoints, the engine's health and the web page."""

    def __init__(self, config: FlyrayConfig, engines: DeploymentHandle, batches: DeploymentHandle | None) -> None:
        """batches: the `BatchReplica`, where `serve.files` is set."""
        self._section = config.serve
        self._batches = batches
        store = BatchStore(Path(config.serve.files)) if config.serve.files else None
        self._files = FilesHttp(store, config.model_name, config.serve.max_file_size)
        metrics = FrontMetrics(config.model_name, serve.get_replica_context().replica_tag)
        pool = EnginePool(ServeRoster(engines), config.serve, Tokenizer(config.model.path), config.model_name, metrics)
        self._http = HttpFront(pool, config.model_name, int(time.time()), metrics)
        self._cluster = ClusterView(pool, config.model_name, metrics)
        self._page = PageFiles()
        self._running = asyncio.ensure_future(pool.run())

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve behind the constructor: the routes with what stands before them."""
        app: FastAPI = getattr(self, "app")  # noqa: B009 - Serve's wrapper has it
        keys = ApiKeys(self._section.api_keys_file) if self._section.api_keys_file else None
        guard(app, keys, self._section.cors_origins)
        return app

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

    @_routes.post("/tokenize")
    async def tokenize(self, request: Request) -> Response:
        return await self._http.tokenize(request)

    @_routes.post("/detokenize")
    async def detokenize(self, request: Request) -> Response:
        return await self._http.detokenize(request)

    @_routes.get("/version")
    async def version(self) -> Response:
        return await self._http.version()

    # Load balancers ask with HEAD.
    @_routes.api_route("/health", methods=["GET", "HEAD"])
    async def health(self) -> Response:
        return await self._http.health()

    @_routes.get("/metrics")
    async def metrics(self) -> Response:
        return await self._http.metrics(await self._batch_metrics())

    @_routes.api_route("/v1/files{rest:path}", methods=METHODS)
    async def files(self, request: Request) -> Response:
        return await self._files.answer(request)

    @_routes.api_route("/v1/batches{rest:path}", methods=METHODS)
    async def batches(self, request: Request) -> Response:
        return await self._files.answer(request)

    @_routes.get("/cluster")
    async def cluster(self) -> Response:
        return await self._cluster.cluster()

    @_routes.get("/cluster/trace")
    async def trace(self, engine: str) -> Response:
        return await self._cluster.trace(engine)

    @_routes.get("/")
    async def page(self, request: Request) -> Response:
        return self._page.answer(request)

    @_routes.get("/page/{name:path}")
    async def page_file(self, request: Request, name: str) -> Response:
        return self._page.answer(request, name)

    async def _batch_metrics(self) -> list[FrontMetrics]:
        """What batch lines met; none while their process is away."""
        if self._batches is None:
            return []
        try:
            return [await asyncio.wait_for(self._batches.metrics.remote(), _METRICS_TIMEOUT_S)]
        except Exception:  # as many as a dead or a starting replica has
            return []

    async def __del__(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running


class FromFile(BaseModel):
    """path: of a configuration file, the same on every node."""

    path: str


def from_file(arguments: FromFile) -> serve.Application:
    """The application for who deploys with Serve's own means (`serve run`, KubeRay's RayService), which bring the
    cluster and the HTTP port. Raises ConfigError."""
    return application(load_config(arguments.path))


def application(config: FlyrayConfig) -> serve.Application:
    """The application: engines, fronts, and what runs batches where files are kept. Raises ConfigError."""
    if config.serve.files == TEMPORARY:
        raise ConfigError("serve.files: 'temporary' is for `flyray serve`; name a folder that all nodes see")
    flush = FLUSH_TIMEOUT_S if config.engine.statistics else 0.0
    engines = serve.deployment(
        name=ENGINE,
        max_ongoing_requests=_MAX_ONGOING,
        # The replica's own bundle holds the router's process; every shard has a bundle after it.
        placement_group_bundles=[{"CPU": 1.0}] + [config.engine_config().shard_bundle] * config.engine.shards,
        placement_group_strategy="PACK",
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=_NOTICE_S,
        graceful_shutdown_timeout_s=_NOTICE_S + config.serve.engines.drain_timeout_s + _STOP_S + flush,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **_scaling(config),
    )(EngineReplica)
    front = serve.deployment(
        name=FRONT,
        num_replicas=config.serve.front_replicas,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 1.0},
        graceful_shutdown_timeout_s=5.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(Front)
    batches = serve.deployment(
        name=BATCHES,
        max_ongoing_requests=_MAX_ONGOING,
        ray_actor_options={"num_cpus": 0.0},
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=5.0,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(BatchReplica)
    bound = engines.bind(config)
    return front.bind(config, bound, batches.bind(config, bound) if config.serve.files else None)


def _scaling(config: FlyrayConfig) -> dict[str, Any]:
    """The deployment's options that say how many engines there are."""
    section = config.serve.engines
    if section.min == section.max:
        return {"num_replicas": section.min}
    policy = AutoscalingPolicy(policy_function=EngineScaling, policy_kwargs={"target_requests": config.target_requests})
    with warnings.catch_warnings():
        # Serve's setting for all deployments that is to take the place of this one is read when Ray is started.
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=section.min,
            initial_replicas=max(section.min, 1),
            max_replicas=section.max,
            metrics_interval_s=_LOAD_PERIOD_S,
            look_back_period_s=_LOAD_WINDOW_S,
            upscale_delay_s=section.up_delay_s,
            downscale_delay_s=section.down_delay_s,
            policy=policy,
        )
    return {"autoscaling_config": scaling}
