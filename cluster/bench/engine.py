"""`flyray bench engine`: decode and prefill rates of a model through the whole engine, formats and peers in turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from ...actors.engine_config import EngineConfig
from ...actors.linear_kinds import check_linear_kinds
from ...actors.model.config import ModelConfig
from ...kernels.formats import FORMATS
from ..engine import Engine, EngineClient
from .engine_load import EngineLoad
from .engine_report import EngineBench, Spreading
from .machine import read_bandwidth, this_machine
from .peers import open_peer
from .rounds import BenchUsageError, Round, Sizes, Variant
from .routing import touched_experts
from .traffic import LinearBits, step_traffic

PAGE = 16
# A router that does not answer for so long is gone: peers and passes over memory starve it between rounds.
_SILENCE_S = 60.0


@dataclass(frozen=True)
class EngineSettings:
    """What is measured. threads: of each shard. runs: rounds, in each of which every variant is measured once.
    int8_weights, int4_weights: as in `EngineConfig`, for all formats; where neither is given, those of `LinearBits.of`
    the format. peers: names of PEERS, on as many threads as all shards together. work_dir: keeps their weights."""

    formats: tuple[str, ...]
    sizes: Sizes
    threads: int = 2
    shards: int = 1
    runs: int = 3
    int8_weights: tuple[str, ...] | None = None
    int4_weights: tuple[str, ...] | None = None
    peers: tuple[str, ...] = ()
    work_dir: Path = Path()

    def __post_init__(self) -> None:
        """Raises BenchUsageError for formats and weights that there are not."""
        for word in self.formats:
            if word not in FORMATS:
                raise BenchUsageError(f"format: {word!r} is unknown; known are {', '.join(FORMATS)}")
        try:
            check_linear_kinds(self.int8_weights or (), self.int4_weights or ())
        except ValueError as error:
            raise BenchUsageError(str(error)) from None

    def linears(self, format: str) -> LinearBits:
        """The weights beside the routed experts of that format's engine."""
        if self.int8_weights is None and self.int4_weights is None:
            return LinearBits.of(format)
        return LinearBits(self.int8_weights or (), self.int4_weights or ())

    @property
    def cpus(self) -> int:
        """What Ray must have for all engines at once."""
        return len(self.formats) * self.all_threads

    @property
    def all_threads(self) -> int:
        return self.shards * self.threads

    def engine(self, path: Path, format: str) -> EngineConfig:
        """An engine with room for the largest batch, whose steps take a whole prompt."""
        linears = self.linears(format)
        most, longest = max(self.sizes.batches), self.sizes.prefill + self.sizes.decode
        return EngineConfig(
            model_path=str(path),
            name=format,
            precision=format,
            shards=self.shards,
            threads_per_shard=self.threads,
            page_size=PAGE,
            kv_pages=most * (-(-longest // PAGE) + 1),
            max_batch_tokens=max(512, self.sizes.prefill),
            max_sequences=most,
            int8_weights=linears.int8,
            int4_weights=linears.int4,
        )


async def bench_engine(path: Path, model: str, settings: EngineSettings, say: Callable[[str], None]) -> EngineBench:
    """Measures in the Ray that is initialized; all engines and peers stand at once and are measured in turns.

    model: its name in the report. Raises BenchError, BenchUsageError, and what starting an engine raises.
    """
    config = ModelConfig.from_dict(Checkpoint(path).config)
    rounds: dict[str, list[Round]] = {name: [] for name in (*settings.formats, *settings.peers)}
    bandwidth = 0.0
    async with AsyncExitStack() as stack:
        variants: dict[str, Variant] = {}
        for format in settings.formats:
            running = _engine(settings.engine(path, format), config.vocab_size)
            variants[format] = await stack.enter_async_context(running)
        for peer in settings.peers:
            opened = open_peer(peer, path, settings.work_dir, settings.all_threads)
            variants[peer] = stack.enter_context(opened)
        for variant in variants.values():
            await variant.measure(settings.sizes)  # warms pages and caches, and is not counted
        for number in range(1, settings.runs + 1):
            bandwidth = max(bandwidth, await asyncio.to_thread(read_bandwidth, settings.all_threads))
            for name, variant in variants.items():
                rounds[name].append(await variant.measure(settings.sizes))
                say(f"run {number}, {name}: {_words(rounds[name][-1])}")
    spreading = {
        (format, batch): _spreading(path, config, settings, format, batch, rounds[format][-1], bandwidth)
        for format in settings.formats
        for batch in settings.sizes.batches
    }
    linears = {format: str(settings.linears(format)) for format in settings.formats}
    return EngineBench(
        model, this_machine(), settings.shards, settings.threads, settings.sizes, rounds, bandwidth, spreading, linears
    )


def _spreading(
    path: Path, config: ModelConfig, settings: EngineSettings, format: str, batch: int, last: Round, bandwidth: float
) -> Spreading:
    """What the batch's decode steps read of the experts and in all."""
    texts, sizes, linears = last.texts[batch], settings.sizes, settings.linears(format)
    touched = float(config.num_experts_per_tok)
    if batch > 1:
        touched = touched_experts(path, format, linears, texts, sizes.decode, settings.all_threads)
    context = sizes.prefill + sizes.decode // 2
    traffic = step_traffic(config, format, linears, touched, batch, context)
    return Spreading(touched, config.n_routed_experts, traffic.total, batch * bandwidth / traffic.total)


def _words(found: Round) -> str:
    parts = []
    for batch, rate in found.decode.items():
        step = f" ({found.step_ms[batch]:.2f} ms a step)" if batch in found.step_ms else ""
        parts.append(f"b{batch} {rate:.1f} tok/s{step}")
    return ", ".join([*parts, f"prefill {found.prefill:.0f} tok/s"])


@asynccontextmanager
async def _engine(config: EngineConfig, vocabulary: int) -> AsyncIterator[EngineLoad]:
    """A running engine; ended with the context, also when it is cancelled while it starts."""
    engine = await asyncio.to_thread(Engine, config)
    starting = asyncio.ensure_future(asyncio.to_thread(engine.start))
    try:
        await asyncio.shield(starting)
        async with EngineClient(engine.address, engine.keys, _SILENCE_S) as client:
            yield EngineLoad(client, vocabulary)
    finally:
        await asyncio.wait([starting])  # a thread cannot be cancelled: what it starts must be stopped after it
        await asyncio.to_thread(engine.stop)
