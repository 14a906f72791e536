"""What an evaluation measures, and with which engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...actors.engine_config import EngineConfig

WORK_DIR = Path.home() / ".cache" / "flyray"


@dataclass(frozen=True)
class EvalSettings:
    """What is measured and how. tasks: of each family, 0 for none. text_bytes: of text, 0 for none. window: tokens
    scored at once. lanes: engines that run at a time, each of `shards` shards with `threads` threads."""

    tasks: int = 20
    text_bytes: int = 200_000
    window: int = 1024
    max_tokens: int = 400
    shards: int = 1
    threads: int = 1
    lanes: int = 2
    concurrency: int = 16

    @property
    def cpus(self) -> int:
        return self.shards * self.threads * self.lanes

    def engine(self, path: Path, precision: str = "auto") -> EngineConfig:
        """The engines' settings, with a KV cache for `concurrency` sequences."""
        return EngineConfig(
            model_path=str(path),
            precision=precision,
            shards=self.shards,
            threads_per_shard=self.threads,
            max_sequences=self.concurrency,
        )
