"""The process that runs batches: a Serve deployment of one replica, which Serve replaces when it dies."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from ray import serve
from ray.serve.handle import DeploymentHandle

from ..answer_run import NO_LIMIT
from ..config import FlyrayConfig
from ..engine_roster import ServeRoster
from ..front.engine_pool import EnginePool
from ..front.metrics import FrontMetrics
from ..tokenizer import Tokenizer
from .batch_store import BatchStore
from .runner import BatchRunner
from .served_lines import ServedLines


class BatchReplica:
    """Runs the batches of `serve.files`, away from the fronts: their disk and their work are in no front's way."""

    def __init__(self, config: FlyrayConfig, engines: DeploymentHandle) -> None:
        self._metrics = FrontMetrics(config.model_name, serve.get_replica_context().replica_tag)
        section = config.serve.model_copy(update={"max_queue": NO_LIMIT})
        tokenizer = Tokenizer(config.model.path)
        pool = EnginePool(ServeRoster(engines), section, tokenizer, config.model_name, self._metrics)
        room = config.engine.max_sequences * section.engines.max
        runner = BatchRunner(BatchStore(Path(section.files)), ServedLines(pool), room)
        self._running = asyncio.gather(pool.run(), runner.run())

    async def metrics(self) -> FrontMetrics:
        """What its lines met so far."""
        return self._metrics

    def check_health(self) -> None:
        """For Serve, which replaces this replica when it raises."""
        if self._running.done():
            self._running.result()

    async def __del__(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
