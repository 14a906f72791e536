"""`flyray bench layers`: a decoder layer's time by the difference of two depths, on one shard and on several.

The model's own stages with random weights, in processes of their own: no router, no Ray, no checkpoint.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from ...actors.linear_kinds import check_linear_kinds
from ...actors.model.config import ModelConfig
from ...actors.model.expert_matrix import MATRIX_KINDS
from ...actors.model.prompt_attention import PROMPT_ATTENTIONS, PromptAttention
from ...kernels.select import ACCELERATED, BACKENDS, CPU_BACKENDS, check_expanding
from ..synthesize import Synthesis
from .layer_report import LayerBench
from .layer_shard import LayerTask, Prompts, ShardFailure, ShardTimes, serve_task
from .rounds import BenchError, BenchUsageError
from .traffic import LinearBits

_END_S = 30.0


@dataclass(frozen=True)
class LayerSettings:
    """model: a shipped shape or a config.json, cut or repeated to `layers`. batches: rows of all shards together, with
    `context` tokens each. gpus: numbers of shards, each of which is measured; a CPU backend's are processes of
    `threads` threads. steps: of one sample; runs: samples, of which the median counts. int8_weights, int4_weights: as
    in `EngineConfig`; where neither is given, those of `LinearBits.of` the format. prompt_attention: as there."""

    model: str
    layers: int
    formats: tuple[str, ...]
    batches: tuple[int, ...]
    prompts: tuple[Prompts, ...] = ()
    context: int = 1024
    gpus: tuple[int, ...] = (1,)
    backend: str = "triton"
    threads: int = 2
    steps: int = 20
    runs: int = 5
    int8_weights: tuple[str, ...] | None = None
    int4_weights: tuple[str, ...] | None = None
    prompt_attention: PromptAttention = "absorbed"

    def __post_init__(self) -> None:
        """Raises BenchUsageError for words that there are not, and too few layers for a difference."""
        for name, words, known in (
            ("format", self.formats, tuple(MATRIX_KINDS)),
            ("backend", (self.backend,), BACKENDS),
            ("prompt_attention", (self.prompt_attention,), PROMPT_ATTENTIONS),
        ):
            for word in words:
                if word not in known:
                    raise BenchUsageError(f"{name}: {word!r} is unknown; known are {', '.join(known)}")
        try:
            check_linear_kinds(self.int8_weights or (), self.int4_weights or ())
            if self.prompt_attention == "expanded":
                check_expanding(self.backend, "auto")
        except ValueError as error:
            raise BenchUsageError(str(error)) from None

    def config(self) -> ModelConfig:
        """The deepest model. Raises SynthesizeError or ConfigError for the model, BenchUsageError for its depth."""
        changes = {"num_hidden_layers": self.layers}
        config = ModelConfig.from_dict(Synthesis(self.model, changes, "bf16").config())
        least = config.first_k_dense_replace + 2
        if self.layers < least:
            raise BenchUsageError(
                f"layers: {self.layers} leaves no two depths with experts; at least {least} are needed"
            )
        return config

    def linears(self, format: str) -> LinearBits:
        """The weights beside the routed experts of that format."""
        if self.int8_weights is None and self.int4_weights is None:
            return LinearBits.of(format)
        return LinearBits(self.int8_weights or (), self.int4_weights or ())

    def task(self, config: ModelConfig, shard: int, shards: int) -> LayerTask:
        """What one process runs."""
        formats = {format: self.linears(format) for format in self.formats}
        return LayerTask(
            config, formats, self.batches, self.prompts, self.context, self.backend, self.threads, self.steps,
            self.runs, shard, shards, self.prompt_attention,
        )  # fmt: skip


def bench_layers(settings: LayerSettings, say: Callable[[str], None]) -> LayerBench:
    """Measures each number of shards after another. Raises BenchUsageError where there are not so many GPUs, BenchError
    with what a process died of."""
    config = settings.config()
    if settings.backend in ACCELERATED and (found := torch.accelerator.device_count()) < max(settings.gpus):
        raise BenchUsageError(
            f"gpus: {max(settings.gpus)} with the backend {settings.backend!r}, and torch finds {found} here; "
            f"backends without: {', '.join(CPU_BACKENDS)}"
        )
    times = {}
    for shards in settings.gpus:
        say(f"{shards} of {settings.backend}: {config.num_hidden_layers} layers")
        times[shards] = _run([settings.task(config, shard, shards) for shard in range(shards)], say)
    linears = {format: settings.linears(format) for format in settings.formats}
    return LayerBench(settings.model, config, settings.context, linears, times)


def _run(tasks: Sequence[LayerTask], say: Callable[[str], None]) -> tuple[ShardTimes, ...]:
    """All tasks at once, a process each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not by every process
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for task in tasks:
            here, there = context.Pipe()
            process = context.Process(target=serve_task, args=(task, there), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        addresses = [_receive(pipe, say) for pipe in pipes]
        for pipe in pipes:
            pipe.send(addresses)
        return tuple(_result(pipe, say) for pipe in pipes)
    finally:
        for process in processes:
            process.join(_END_S if process.exitcode is None else 0)
            process.kill()


def _result(pipe: Connection, say: Callable[[str], None]) -> ShardTimes:
    while not isinstance(found := _receive(pipe, say), ShardTimes):
        say(found)
    return found


def _receive(pipe: Connection, say: Callable[[str], None]) -> str | ShardTimes:
    """Raises BenchError for a process that failed or died."""
    try:
        found = pipe.recv()
    except EOFError:
        raise BenchError("a process ended before it was done; what it printed last says why") from None
    if isinstance(found, ShardFailure):
        raise BenchError(found.text)
    return found
