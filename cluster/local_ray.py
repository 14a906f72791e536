"""A Ray cluster of this machine alone, that leaves nothing behind.

All its files, Unix sockets included, lie in one private folder that is removed at the end; all its processes are ended,
also those whose parents died.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from ..actors.device_choice import ALL_GPUS_VISIBLE
from .held_port import HeldPort
from .processes import adopt_orphans, descendants, end_descendants

# Ray's least; flyray keeps nothing in the object store.
_OBJECT_STORE_BYTES = 80 << 20
# A request this long is buffered whole. HAProxy takes a buffer only while a connection needs one.
_HAPROXY_BUFFER_BYTES = 128 << 10

SERVE_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A proxy that has not come up after three times this is killed, and with it the start of the server: on a busy
    # machine it may take as long.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "40",
    # Serve's replicas would else pass every token of a stream from one event loop to another.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Serve's own counts, ten times a second by default: half of what an idle replica costs.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    # How often the controller looks after its replicas: at 0.1 s, the default, it takes 4.5 % of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # HAProxy 2.8 does not notice that a client left if the request's body came in a packet of its own, unless it takes
    # in the body, of up to a buffer's size, before it passes the request on. Ray has no setting for that option, but it
    # writes this one into the same section as it stands, line break included.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "leastconn\n    option http-buffer-request",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_HAPROXY_BUFFER_BYTES),
}
"""What a Ray has in its environment, from its start on, to serve well; deploy/cluster has it for other clusters."""


class LocalRay:
    """A context in which `ray` is connected to a fresh local cluster of `cpus` CPUs (a count for placement only).

    http: prepare for Serve behind HAProxy. Ray reads its settings from the environment when it is imported, so enter
    before that. keep_logs: leave the folder, for looking into Ray's logs afterwards.
    """

    def __init__(self, cpus: int, *, http: bool = False, keep_logs: bool = False) -> None:
        self._cpus = cpus
        self._http = http
        self._keep_logs = keep_logs
        self._before: set[int] = set()
        self._ports: list[HeldPort] = []
        self._saved: dict[str, str | None] = {}
        # Ray's socket paths are long and may have 107 characters in all, so the folder's name is short.
        self.folder = Path(tempfile.mkdtemp(prefix="fr-"))

    def __enter__(self) -> LocalRay:
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

    def start(self) -> None:
        """Starts the cluster and connects `ray` to it. Call `stop` also when this fails."""
        self._before = descendants()
        adopt_orphans()
        for name, value in self._environment().items():
            self._saved[name] = os.environ.get(name)
            os.environ[name] = value
        import ray

        ray.init(
            address="local",
            num_cpus=self._cpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(self.folder / "ray"),
        )

    def stop(self) -> None:
        """Ends the cluster: Ray's own shutdown first, then whatever is left. May be called twice."""
        import ray

        ray.shutdown()
        self.end_now(grace_s=1.0)
        for port in self._ports:
            port.close()
        self._ports.clear()
        for name, value in self._saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._saved.clear()

    def end_now(self, grace_s: float = 0.0) -> None:
        """Ends all processes and removes the folder, without asking Ray."""
        end_descendants(spare=self._before, grace_s=grace_s)
        if not self._keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        values = {
            "TMPDIR": str(self.folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A thread of Serve's that is late would else start another Ray after this one has ended.
            "RAY_ENABLE_AUTO_CONNECT": "0",
            # A process that sees its own GPU alone cannot reach the others' memory through RCCL; `ShardActor` takes the
            # one that Ray gave it.
            **dict.fromkeys(ALL_GPUS_VISIBLE, "1"),
        }
        if "ray" not in sys.modules:
            # A token of this process's clusters alone, instead of one that Ray would keep in the home folder. Where a
            # token is set Ray turns its authentication on by itself. Once imported it knows its token.
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        return values | (self._haproxy_environment() if self._http else {})

    def _haproxy_environment(self) -> dict[str, str]:
        """HAProxy's files and side ports; Ray's defaults are fixed and would clash with a second cluster's."""
        stats_port, metrics_port = self._ports = [HeldPort(), HeldPort()]
        return SERVE_ENVIRONMENT | {
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self.folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self.folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(self.folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(self.folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(self.folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port.number),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port.number),
        }
