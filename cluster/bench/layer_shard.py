"""One process of `flyray bench layers`: a shard of a model with random weights, timed at two depths."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from ...actors.collective_exchange import CollectiveExchange
from ...actors.exchange import Exchange, LocalExchange
from ...actors.expert_placement import LayerPlacement
from ...actors.expert_routes import ExpertRoutes
from ...actors.kernel_shapes import kernel_shapes, rounded_linears
from ...actors.linear_kinds import LINEAR_KINDS
from ...actors.link import LinkPlace
from ...actors.model.config import ModelConfig
from ...actors.model.kv_pages import KvPages
from ...actors.model.prompt_attention import PromptAttention
from ...actors.random_weights import random_shard
from ...kernels.composition import KernelPlan
from ...kernels.protocol import Kernels, PagedBatch, SamplingRow
from ...kernels.select import ACCELERATED, device_kv_dtype, plan_kernels, select_kernels
from .device_ceilings import DeviceCeilings, measure_ceilings
from .kernel_cases import PAGE, paged_batch
from .layer_pass import ModelPass, Repeated, WatchedStages
from .rounds import BenchUsageError
from .traffic import LinearBits

_TIMEOUT_S = 120.0
_GREEDY = SamplingRow(0.0, 1.0, 0, 0, 0)


@dataclass(frozen=True)
class Prompts:
    """Prompts that are prefilled in one step."""

    count: int
    tokens: int

    @staticmethod
    def parse(text: str) -> Prompts:
        """Of "2048", or "8x2048" for eight. Raises BenchUsageError."""
        numbers = text.split("x")
        if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
            raise BenchUsageError(f"prefill: {text!r} is neither a number of tokens nor COUNTxTOKENS, such as 8x2048")
        return Prompts(1 if len(numbers) == 1 else int(numbers[0]), int(numbers[-1]))

    def __str__(self) -> str:
        return f"{self.count}x{self.tokens}" if self.count > 1 else str(self.tokens)


@dataclass(frozen=True)
class LayerTask:
    """What one process runs. config: of the deepest model. formats: of the routed experts, each with what goes with it.
    batches: rows of all shards together. prompts: prefilled where there is one shard. steps: of one sample; runs:
    samples."""

    config: ModelConfig
    formats: Mapping[str, LinearBits]
    batches: tuple[int, ...]
    prompts: tuple[Prompts, ...]
    context: int
    backend: str
    threads: int
    steps: int
    runs: int
    shard: int
    shards: int
    prompt_attention: PromptAttention = "absorbed"

    @property
    def shallow(self) -> int:
        """Layers of the model with a single MoE layer."""
        return self.config.first_k_dense_replace + 1

    @property
    def depths(self) -> tuple[int, int, int]:
        """Nothing but embedding and head, one MoE layer, and all layers."""
        return 0, self.shallow, self.config.num_hidden_layers

    def rows(self, batch: int) -> int:
        """Rows of each shard: as many on all, so that a batch that does not divide is filled up."""
        return -(-batch // self.shards)


@dataclass(frozen=True)
class DecodeTimes:
    """pass_s: seconds of a pass by depth. step_s: with sampling, and the host waiting for the tokens, by depth.
    chosen: [MoE layers, T, K] experts. tokens: [T] the greedy ones."""

    pass_s: Mapping[int, float]
    step_s: Mapping[int, float]
    chosen: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class FormatTimes:
    """weight_bytes, used_bytes: on the device, by weights, and by everything in the end; 0 on CPUs. kv_itemsize: bytes
    of a value in the KV cache. prefill_s: by prompts and depth."""

    weight_bytes: int
    used_bytes: int
    kv_itemsize: int
    decode: Mapping[int, DecodeTimes]
    prefill_s: Mapping[Prompts, Mapping[int, float]]


@dataclass(frozen=True)
class ShardTimes:
    """What a process measured: its device, and by format."""

    device: str
    ceilings: DeviceCeilings
    formats: Mapping[str, FormatTimes]


@dataclass(frozen=True)
class ShardFailure:
    """What ended a process."""

    text: str


def serve_task(task: LayerTask, pipe: Connection) -> None:
    """A process's main: sends its address and takes all shards' through `pipe`, then sends lines of progress, and last
    its `ShardTimes` or a `ShardFailure`."""
    try:
        with torch.inference_mode():
            pipe.send(_LayerShard(task, pipe).measure())
    except Exception:
        pipe.send(ShardFailure(traceback.format_exc()))


class _LayerShard:
    def __init__(self, task: LayerTask, pipe: Connection) -> None:
        self._task, self._pipe = task, pipe
        if task.backend in ACCELERATED:
            torch.accelerator.set_device_index(task.shard)
        self._placement = LayerPlacement.contiguous(task.config.n_routed_experts, task.shards)
        self._kernels: Kernels = select_kernels(task.backend, task.threads, plan=self._plan())

    def _plan(self) -> KernelPlan | None:
        """Of all formats together; each has kinds of experts and linears of its own."""
        task = self._task
        each = [rounded_linears(bits.int8, bits.int4) for bits in task.formats.values()]
        linears = {word: tuple(dict.fromkeys(kind for one in each for kind in one[word])) for word in LINEAR_KINDS}
        most, dtype = max(self._placement.sizes), device_kv_dtype("auto")
        shapes = kernel_shapes(task.config, task.formats.keys(), linears, most, dtype, PAGE)
        return plan_kernels(task.backend, "auto", shapes, {})

    def measure(self) -> ShardTimes:
        task, device = self._task, self._kernels.device
        routes = ExpertRoutes(task.shard, self._placement, task.config.num_hidden_layers)
        exchange = CollectiveExchange("bench", 0, routes, task.config.hidden_size, _TIMEOUT_S)
        self._pipe.send(exchange.open(LinkPlace(folder=tempfile.gettempdir())) if task.shards > 1 else "")
        addresses = self._pipe.recv()
        ceilings = measure_ceilings(device, task.threads)
        self._exchange: Exchange = LocalExchange()
        if task.shards > 1:
            exchange.connect(addresses, device, self._kernels.activation_dtype)
            # Backends for CPUs run no pairs of experts that are elsewhere.
            most = max(map(task.rows, task.batches))
            self._exchange = exchange if device.type == "cpu" else exchange.fixed(most, task.config.num_experts_per_tok)
        found = {}
        for format, linears in task.formats.items():
            found[format] = self._format(format, linears)
            gc.collect()
            if device.type != "cpu":
                torch.accelerator.empty_cache()
        if task.shards > 1:
            exchange.close()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return ShardTimes(name, ceilings, found)

    def _format(self, format: str, linears: LinearBits) -> FormatTimes:
        task, kernels = self._task, self._kernels
        begin, empty = time.perf_counter(), self._used()
        weights = random_shard(
            task.config, format, self._placement.held[task.shard], kernels, linears.int8, linears.int4
        )
        weight_bytes = self._used() - empty
        self._say(f"{format}: made {weight_bytes / 1e9:.1f} GB of weights in {time.perf_counter() - begin:.0f} s")
        prompts = task.prompts if task.shards == 1 else ()
        most = max(task.rows(batch) for batch in task.batches) * -(-task.context // PAGE)
        pages = max([most, *(each.count * -(-each.tokens // PAGE) for each in prompts)])
        kv = KvPages.allocate(task.config, pages, PAGE, kernels)
        self._pass = ModelPass(WatchedStages(task.config, weights, kernels, kv, task.prompt_attention), self._exchange)
        self._fill(kv.values)
        last: Repeated | None = None
        decode = {}
        for batch in sorted(task.batches, reverse=True):  # the largest first: others fit its graphs' memory
            decode[batch], last = self._decode(batch, last)
            self._say(f"{format}, batch {batch}: {1000 * decode[batch].step_s[task.depths[2]]:.2f} ms a step")
        used = self._used()
        del last
        prefill = {}
        for each in prompts:
            prefill[each] = self._prefill(each)
            self._say(f"{format}, prompt {each}: {1000 * prefill[each][task.depths[2]]:.1f} ms")
        return FormatTimes(weight_bytes, max(used, self._used()), kv.values.itemsize, decode, prefill)

    def _fill(self, values: Tensor) -> None:
        """Random entries, the same of each sequence on whatever shard. Pairs of bfloat16 are finite in every layout."""
        task, each = self._task, -(-self._task.context // PAGE)
        words, generator = values.view(torch.bfloat16), torch.Generator(values.device)
        for row in range(values.shape[1] // each):
            generator.manual_seed(task.shard + task.shards * row)
            part = words[:, row * each : (row + 1) * each]
            part.copy_(torch.empty_like(part, memory_format=torch.contiguous_format).normal_(generator=generator))

    def _decode(self, batch: int, beside: Repeated | None) -> tuple[DecodeTimes, Repeated]:
        """A step of one token a sequence. Sequence n is row n // shards of shard n % shards."""
        task, kernels, rows = self._task, self._kernels, self._task.rows(batch)
        numbers = task.shard + task.shards * torch.arange(rows)
        tokens, paged = self._inputs([1] * rows, [task.context] * rows, numbers)
        chosen = self._pass.chosen(tokens, paged, task.depths[2])
        passes: dict[int, Repeated] = {}
        for depth in task.depths:
            run = _bound(self._pass.run, tokens, paged, depth)
            beside = passes[depth] = Repeated(kernels, run, self._exchange.captures, beside)
        sampling = [_GREEDY] * rows

        def step(depth: int) -> Tensor:
            passes[depth].again()
            return kernels.sample(passes[depth].result, sampling).tokens.cpu()

        pass_s = self._seconds({depth: each.again for depth, each in passes.items()}, task.steps)
        ends = task.depths[0], task.depths[2]
        step_s = self._seconds({depth: _bound(step, depth) for depth in ends}, task.steps)
        greedy = step(task.depths[2])
        assert beside is not None
        return DecodeTimes(pass_s, step_s, chosen.cpu().numpy(), greedy.numpy()), beside

    def _prefill(self, prompts: Prompts) -> dict[int, float]:
        task, lengths = self._task, [prompts.tokens] * prompts.count
        tokens, paged = self._inputs(lengths, lengths, torch.arange(sum(lengths)))
        last = (paged.query_start[1:] - 1).long()
        runs = {depth: _bound(self._pass.run, tokens, paged, depth, last) for depth in task.depths[1:]}
        for run in runs.values():
            run()  # compiles, and takes memory
        return self._seconds(runs, 1)

    def _inputs(self, queries: Sequence[int], contexts: Sequence[int], numbers: Tensor) -> tuple[Tensor, PagedBatch]:
        """numbers: of each token, which decide it."""
        device = self._kernels.device
        paged, _ = paged_batch(queries, contexts)
        moved = paged.moved(lambda tensor: tensor.to(device))
        return ((numbers * 7919 + 13) % self._task.config.vocab_size).to(device), moved

    def _seconds(self, runs: Mapping[int, Callable[[], object]], steps: int) -> dict[int, float]:
        """Medians of seconds a call, in turns."""
        samples: dict[int, list[float]] = {depth: [] for depth in runs}
        for _ in range(self._task.runs):
            for depth, run in runs.items():
                self._wait()
                begin = time.perf_counter()
                for _ in range(steps):
                    run()
                self._wait()
                samples[depth].append((time.perf_counter() - begin) / steps)
        return {depth: statistics.median(each) for depth, each in samples.items()}

    def _wait(self) -> None:
        if self._kernels.device.type != "cpu":
            torch.accelerator.synchronize()

    def _used(self) -> int:
        """Bytes in use on the device, by whomever."""
        device = self._kernels.device
        if device.type == "cpu":
            return 0
        torch.accelerator.empty_cache()
        free, total = torch.accelerator.get_memory_info(device)
        return total - free

    def _say(self, text: str) -> None:
        if self._task.shard == 0:
            self._pipe.send(text)


def _bound(call: Callable[..., Tensor], *arguments: object) -> Callable[[], Tensor]:
    return lambda: call(*arguments)
