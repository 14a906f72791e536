"""`flyray trace`: decode steps of an engine as a timeline file, as they were measured and as they were planned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from ..actors.measured_costs import LINK_US, stage_costs
from ..actors.request import TracedStep
from ..actors.stage_program import CHANNELS
from .chat import ChatService
from .front.requests import CompletionRequest
from .job import run_on_ray

if TYPE_CHECKING:
    from ..actors.engine_config import EngineConfig
    from .config import FlyrayConfig

STOPPED = 130

SPARE_STEPS = 32


@dataclass(frozen=True)
class TraceSettings:
    """steps: recorded decode steps. sequences: that run in them. prompt_tokens: of each before its first token."""

    steps: int = 16
    sequences: int = 8
    prompt_tokens: int = 64


class TraceError(Exception):
    """The steps could not be recorded."""


def run(config: FlyrayConfig, output: str | Path, settings: TraceSettings, *, keep_logs: bool = False) -> int:
    """Starts the configuration's engine, records, and writes Chrome's trace format, which Perfetto opens.

    The planned timeline is the stage program simulated with the median measured cost of each kind of stage. Returns the
    exit code: 0, or 130 after a signal. Raises TraceError, OSError, and what starting an engine raises.
    """
    target = Path(output)
    if not target.absolute().parent.is_dir():
        raise TraceError(f"{target}: there is no such folder to write to")
    try:
        cpus = config.engine.shards * config.engine.threads_per_shard
        main = partial(_record, config, target, settings)
        print(run_on_ray(main, cpus=cpus, address=config.ray.address, keep_logs=keep_logs))
    except KeyboardInterrupt:
        print("stopped")
        return STOPPED
    return 0


async def _record(config: FlyrayConfig, output: Path, settings: TraceSettings) -> str:
    # Imported here, when Ray's environment is set.
    from ..actors.simulate import simulate
    from ..actors.trace import write_trace
    from .engine_session import engine_session

    async with engine_session(config.engine_config(), config.model_name) as session:
        engine = session.engine
        tokens = room(engine.config, engine.shape.kv_pages, engine.shape.context_length, settings)
        requests = [_request(session.service, number, settings, tokens) for number in range(settings.sequences)]
        events = [asyncio.Event() for _ in requests]
        streams = [
            asyncio.ensure_future(_run(session.service, request, event))
            for request, event in zip(requests, events, strict=True)
        ]
        try:
            await _all_decode(events, streams)
            status = await session.client.status(trace_steps=settings.steps)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        program = session.engine.shape.program
        planned = simulate(program, _costs(status.trace), shards=config.engine.shards)
        write_trace(output, planned, status.trace)
    measured = median(_durations(status.trace))
    return (
        f"{output}: {settings.steps} steps of {settings.sequences} sequences on {config.engine.shards} shards; a step "
        f"takes {measured / 1000:.1f} ms measured, {planned.duration / 1000:.1f} ms planned "
        f"({planned.bubble_share():.0%} idle). Open it at https://ui.perfetto.dev"
    )


def _costs(steps: Sequence[TracedStep]) -> dict[str, float]:
    """Of the stages and links of a step. Raises TraceError if nothing was recorded."""
    costs = stage_costs(steps)
    if not costs:
        raise TraceError("the engine recorded no stages")
    return costs | {f"link.{channel}": LINK_US for channel in CHANNELS}


def room(engine: EngineConfig, kv_pages: int, context_length: int, settings: TraceSettings) -> int:
    """Most tokens that each sequence can decode while all of them run at once.

    kv_pages: of a shard. Raises TraceError if that is not enough for the recorded steps.
    """
    if settings.sequences > engine.max_sequences:
        raise TraceError(f"{settings.sequences} sequences: engine.max_sequences is {engine.max_sequences}")
    # With tensor-parallel attention every shard has the pages of all sequences.
    caches = engine.shards if engine.attention == "data_parallel" else 1
    on_a_shard = -(-settings.sequences // caches)
    tokens = min(kv_pages // on_a_shard * engine.page_size, context_length) - settings.prompt_tokens
    # Sequences decode while later ones are prefilled and the order to record is on its way.
    if tokens < settings.steps + settings.sequences + SPARE_STEPS:
        raise TraceError(
            f"{settings.steps} steps of {settings.sequences} sequences do not fit the KV cache of {kv_pages} pages a "
            f"shard and the context of {context_length} tokens; record fewer, or raise engine.kv_memory"
        )
    return tokens


def _request(service: ChatService, number: int, settings: TraceSettings, tokens: int) -> CompletionRequest:
    # Ids of ordinary text, another text for each sequence.
    prompt = [(31 * number + 7 * position) % 1000 + 100 for position in range(settings.prompt_tokens)]
    return CompletionRequest(model=service.model_name, prompt=prompt, ignore_eos=True, max_tokens=tokens)


async def _run(service: ChatService, request: CompletionRequest, decoding: asyncio.Event) -> None:
    """Decodes until it is cancelled or the context is full."""
    async with aclosing(service.completion(request)) as deltas:
        async for _ in deltas:
            decoding.set()


async def _all_decode(events: Sequence[asyncio.Event], streams: Sequence[asyncio.Future[None]]) -> None:
    """Waits until every sequence has given a token. Raises what a stream raises, TraceError if one ends before."""
    everyone = asyncio.ensure_future(asyncio.wait([asyncio.ensure_future(event.wait()) for event in events]))
    await asyncio.wait([everyone, *streams], return_when=asyncio.FIRST_COMPLETED)
    if not everyone.done():
        for stream in streams:
            if stream.done():
                stream.result()
        raise TraceError("a sequence ended before all were running")


def _durations(steps: Sequence[TracedStep]) -> list[float]:
    """Microseconds of each recorded step, from the first stage's begin to the last one's end on one shard."""
    spans: dict[int, float] = {}
    for step in steps:
        if step.stages:
            span = (max(stage.end for stage in step.stages) - min(stage.begin for stage in step.stages)) / 1000
            spans[step.step] = max(span, spans.get(step.step, 0.0))
    return list(spans.values())
