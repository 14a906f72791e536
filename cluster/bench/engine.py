"""`flyray bench engine`: decode and prefill rates of a model through the whole engine, formats and peers in turns."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from ...actors.engine_config import EngineConfig
from ...actors.model.config import ModelConfig
from ..engine import Engine, EngineClient
from ..figures import Figure
from .engine_load import EngineLoad

INT8_WEIGHTS = ("attention", "shared", "dense", "head")
PAGE = 16


@dataclass(frozen=True)
class EngineSettings:
    """What is measured. prefill: prompt tokens. decode: tokens of each sequence that decodes. runs: rounds, in each of
    which every variant is measured once."""

    formats: tuple[str, ...]
    batches: tuple[int, ...] = (1, 8)
    prefill: int = 256
    decode: int = 64
    threads: int = 2
    shards: int = 1
    runs: int = 3
    int8_weights: tuple[str, ...] = INT8_WEIGHTS

    @property
    def cpus(self) -> int:
        """What Ray must have for all engines at once."""
        return len(self.formats) * self.shards * self.threads

    def engine(self, path: Path, format: str) -> EngineConfig:
        """An engine with room for the largest batch, whose steps take a whole prompt."""
        most = max(self.batches)
        extra = {}
        if "int8_weights" in {each.name for each in dataclasses.fields(EngineConfig)}:
            extra["int8_weights"] = self.int8_weights
        return EngineConfig(
            model_path=str(path),
            name=format,
            precision=format,
            shards=self.shards,
            threads_per_shard=self.threads,
            page_size=PAGE,
            kv_pages=most * (-(-(self.prefill + self.decode) // PAGE) + 1),
            max_batch_tokens=max(512, self.prefill),
            max_sequences=most,
            **extra,
        )


@dataclass
class Samples:
    """Rates of one variant, a value a round. step_ms: median time of a decode step, by batch."""

    decode: dict[int, list[float]] = field(default_factory=dict)
    step_ms: dict[int, list[float]] = field(default_factory=dict)
    prefill: list[float] = field(default_factory=list)
    texts: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineBench:
    """What was measured, by variant: a format, or a peer's name."""

    settings: EngineSettings
    samples: dict[str, Samples]

    def figures(self) -> list[Figure]:
        """decode_tok_s.bBATCH.VARIANT, decode_step_ms.bBATCH.VARIANT, prefill_tok_s.TOKENS.VARIANT: medians."""
        found = []
        for name, samples in self.samples.items():
            for batch, values in samples.decode.items():
                found.append(Figure(f"decode_tok_s.b{batch}.{name}", statistics.median(values), "tokens/s"))
            for batch, values in samples.step_ms.items():
                found.append(Figure(f"decode_step_ms.b{batch}.{name}", statistics.median(values), "ms"))
            found.append(
                Figure(f"prefill_tok_s.{self.settings.prefill}.{name}", statistics.median(samples.prefill), "tokens/s")
            )
        return found


async def bench_engine(path: Path, settings: EngineSettings, say: Callable[[str], None]) -> EngineBench:
    """Measures in the Ray that is initialized. Raises BenchError, and what starting an engine raises."""
    vocabulary = ModelConfig.from_dict(Checkpoint(path).config).vocab_size
    samples = {format: Samples() for format in settings.formats}
    async with AsyncExitStack() as stack:
        loads = {
            format: await stack.enter_async_context(_engine(settings.engine(path, format), vocabulary))
            for format in settings.formats
        }
        for load in loads.values():
            await _measure(load, settings, Samples())  # the first round warms pages and caches and is not counted
        for number in range(1, settings.runs + 1):
            for name, load in loads.items():
                await _measure(load, settings, samples[name])
                say(f"run {number}: {name}: {_last(samples[name])}")
    return EngineBench(settings, samples)


async def _measure(load: EngineLoad, settings: EngineSettings, samples: Samples) -> None:
    for batch in settings.batches:
        run = await load.decode(batch, settings.prefill, settings.decode)
        samples.decode.setdefault(batch, []).append(run.tokens_s)
        samples.step_ms.setdefault(batch, []).append(1000 * run.step_s)
        samples.texts[batch] = run.texts
    samples.prefill.append(await load.prefill(settings.prefill))


def _last(samples: Samples) -> str:
    parts = [f"b{batch} {values[-1]:.1f} tok/s" for batch, values in samples.decode.items()]
    parts += [f"(step {samples.step_ms[batch][-1]:.2f} ms)" for batch in list(samples.decode)[:1]]
    return ", ".join([*parts, f"prefill {samples.prefill[-1]:.0f} tok/s"])


@asynccontextmanager
async def _engine(config: EngineConfig, vocabulary: int) -> AsyncIterator[EngineLoad]:
    """A running engine; ended with the context, also when it is cancelled while it starts."""
    engine = await asyncio.to_thread(Engine, config)
    starting = asyncio.ensure_future(asyncio.to_thread(engine.start))
    try:
        await asyncio.shield(starting)
        async with EngineClient(engine.address, engine.keys, silence_s=60.0) as client:
            yield EngineLoad(client, vocabulary)
    finally:
        await asyncio.wait([starting])  # a thread cannot be cancelled: what it starts must be stopped after it
        await asyncio.to_thread(engine.stop)
