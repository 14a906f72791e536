"""What an engine launches on AMD's GPUs, found by running its stages on tensors that have no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...actors.exchange import LocalExchange
from ...actors.model.config import ModelConfig
from ...actors.model.expert_blocks import ExpertBlocks
from ...actors.model.expert_matrix import MATRIX_KINDS, allocate_matrix
from ...actors.model.kv_pages import KvPages
from ...actors.model.stages import ModelStages
from ...actors.model.weight_memory import WeightMemory
from ...actors.random_weights import random_shard
from ...kernels.aiter.attention import GROUP, SPLITS
from ...kernels.aiter.attention import ROWS as MOST_QUERIES
from ...kernels.aiter.key_lists import key_lists
from ...kernels.flydsl.shape import ProductShape
from ...kernels.flydsl.source import TARGETS, FlyDslSource
from ...kernels.kv_entries import ROUNDED
from ...kernels.protocol import ExpertWeights, Int4Matrix, Int8Matrix, activation_format
from ...kernels.sampling import WORDS
from ...kernels.triton import peers
from ...kernels.triton.backend import TritonKernels
from ...kernels.triton.recording import Launch, record
from ..bench.kernel_cases import PAGE, paged_batch
from ..bench.layer_pass import ModelPass, WatchedStages
from ..bench.traffic import LinearBits

ROWS = (1, 8, 16, 24, 32, 40, 64, 128, 256, 512)
"""Rows of a decode step: one or more of every tile that kernels choose by it, and of every way in which Triton
specializes a number, as 1, as a multiple of 16, and as any other."""
PROMPTS = (100, 2048)
_META = torch.device("meta")
_CONTEXT = 1024
_LONG = 10_000
"""Tokens of a prefix: more than are expanded at once."""
_KV_BYTES = 64 << 30
"""Of a shard's KV cache: pointers to less than 2 GiB are compiled in another way."""


@dataclass(frozen=True)
class Wanted:
    """What is to be compiled, each once."""

    triton: tuple[Launch, ...]
    flydsl: tuple[ProductShape, ...]


@dataclass(frozen=True)
class BuildTask:
    """config: of the model. formats: of its routed experts in memory. shards: numbers of GPUs that share them. target:
    an architecture such as gfx942. rows: of decode steps; prompts: tokens, of one in a step."""

    config: ModelConfig
    formats: tuple[str, ...]
    shards: tuple[int, ...]
    target: str
    rows: tuple[int, ...] = ROWS
    prompts: tuple[int, ...] = PROMPTS

    def wanted(self) -> Wanted:
        """Runs everything once on nothing. Raises ValueError for a format or a number of shards that cannot be."""
        products: dict[ProductShape, None] = {}
        with torch.inference_mode():
            launches = record(lambda: self._run(products), self.target)
        return Wanted(launches, tuple(products))

    def _run(self, products: dict[ProductShape, None]) -> None:
        kernels = TritonKernels(_META, torch.bfloat16, self.target)
        for kv_dtype in (torch.float32, *ROUNDED):
            self._passes(TritonKernels(_META, kv_dtype, self.target), self.formats[0], LinearBits())
        for kv_dtype in (torch.bfloat16, *ROUNDED):
            self._expanded_prompts(TritonKernels(_META, kv_dtype, self.target))
        for format in self.formats:
            self._passes(kernels, format, LinearBits.of(format))
            for shards in self.shards:
                for experts in self._sources(kernels, format, products):
                    self._exchange(kernels, experts, format, shards)

    def _passes(self, kernels: TritonKernels, format: str, bits: LinearBits) -> None:
        """Embedding, a dense layer if there is one, a MoE layer, head and sampling, on one shard."""
        config = replace(self.config, num_hidden_layers=self.config.first_k_dense_replace + 1)
        weights = random_shard(config, format, range(1), kernels, bits.int8, bits.int4)
        pages = max(_KV_BYTES // KvPages.page_bytes(config, PAGE, kernels), 1)
        stages = WatchedStages(config, weights, kernels, KvPages.allocate(config, pages, PAGE, kernels))
        layer = config.moe_layers[0]
        blocks = [(range(config.n_routed_experts), kernels.prepare(_experts(config, format, config.n_routed_experts)))]
        stages.replace_experts(layer, ExpertBlocks.of(blocks, torch.device("cpu")))
        run = ModelPass(stages, LocalExchange()).run
        for queries, contexts in self._steps():
            paged, _ = paged_batch(queries, contexts)
            moved = paged.moved(lambda tensor: tensor.to(_META))
            last = moved.query_start[1:].long() if len(queries) == 1 else None
            logits = run(_empty(torch.int64, sum(queries)), moved, config.num_hidden_layers, last)
            kernels.draw(logits, _empty(torch.float64, len(logits), WORDS))
            # What AITER's attention is told, in as many calls as it needs.
            copies = -(-config.num_attention_heads // GROUP)
            key_lists(moved, slice(0, min(sum(queries), MOST_QUERIES)), PAGE, copies, SPLITS)

    def _expanded_prompts(self, kernels: TritonKernels) -> None:
        """Attention with expanded keys and values: of prompts whose context is one slice, or several."""
        config = replace(self.config, num_hidden_layers=1)
        weights = random_shard(config, self.formats[0], range(1), kernels)
        pages = max(_KV_BYTES // KvPages.page_bytes(config, PAGE, kernels), 1)
        stages = ModelStages(config, weights, kernels, KvPages.allocate(config, pages, PAGE, kernels), "expanded")
        for tokens in self.prompts:
            for context in (tokens, tokens + _LONG):
                paged, _ = paged_batch([tokens], [context])
                moved = paged.moved(lambda tensor: tensor.to(_META))
                stages.own_heads(0, _empty(torch.float32, tokens, config.hidden_size), moved)

    def _steps(self) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Tokens of each sequence in a step, and in the cache with them."""
        for rows in self.rows:
            yield [1] * rows, [_CONTEXT] * rows
        for tokens in self.prompts:
            yield [tokens], [tokens]

    def _sources(
        self, kernels: TritonKernels, format: str, products: dict[ProductShape, None]
    ) -> Iterator[TritonKernels | FlyDslSource]:
        """Who has experts in this format; FlyDSL's launches go to `products`."""
        yield kernels
        if self.target in TARGETS and MATRIX_KINDS[format] in (Int4Matrix, Int8Matrix):

            def launcher(shape: ProductShape) -> Callable[..., None]:
                products[shape] = None
                return lambda *_: None

            yield FlyDslSource(kernels, self.target, launcher)

    def _exchange(self, kernels: TritonKernels, source: TritonKernels | FlyDslSource, format: str, shards: int) -> None:
        """The experts of one of so many shards, for rows that all shards have, and the way there and back where they
        write into each other's memory."""
        config, experts, top_k = self.config, self.config.n_routed_experts, self.config.num_experts_per_tok
        if shards > experts:
            raise ValueError(f"expert_parallel: {shards} shards cannot share {experts} experts")
        weights = source.prepare(_experts(config, format, -(-experts // shards)))
        for rows in sorted({*self.rows, *self.prompts}):
            pairs, everybody = _empty(torch.int32, shards * rows * top_k), shards * rows
            mine, all_rows = (
                kernels.quantize(_empty(torch.float32, count, config.hidden_size), activation_format(weights.gate_up))
                for count in (rows, everybody)
            )
            outputs = source.experts(all_rows, pairs, pairs, weights)
            if shards > 1:
                addresses, held = _empty(torch.int64, shards), _empty(torch.int32, shards)
                ids, places = _empty(torch.int32, rows, top_k), (addresses, addresses, addresses)
                routes = _empty(torch.int32, experts, 1), _empty(torch.int32, experts)
                peers.push_rows(mine, ids, routes, places, (held, held), 0)
                peers.meet(addresses, held, held[:1], 0)
                peers.push_outputs(outputs, pairs, addresses)


def _experts(config: ModelConfig, format: str, count: int) -> ExpertWeights:
    memory, inner = WeightMemory(_META), config.moe_intermediate_size
    gate_up = allocate_matrix(format, count, 2 * inner, config.hidden_size, memory)
    return ExpertWeights(gate_up, allocate_matrix(format, count, config.hidden_size, inner, memory))


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)
