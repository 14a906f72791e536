"""What `flyray bench kernels` runs: every kernel in a model's shapes, with what it must read and compute."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...actors.model.config import ModelConfig
from ...kernels.checks import INT4_GROUP
from ...kernels.protocol import (
    ActivationFormat,
    Chunk,
    ExpertMatrix,
    ExpertWeights,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    Int8Weight,
    Kernels,
    LinearWeight,
    PagedBatch,
    SamplingRow,
)
from ...kernels.selfcheck import random_matrix
from ..weight_bytes import matrix_bytes

EXPERT_KINDS: dict[str, type[ExpertMatrix]] = {"w4a8": Int4Matrix, "w8a8": Int8Matrix}
PAGE = 16
# Copies of a kernel's weights are used in turns, as many as a model has layers, so that none is in a core's cache.
_COPIES_BYTES = 512 << 20


@dataclass(frozen=True)
class KernelCase:
    """One kernel at one size. name: as in figures, "experts_w4a8.t8". calls: one a copy of the weights. bytes: of
    weights, cache and tokens that a call must read and write. operations: multiplications and additions. integer:
    whether they are INT8."""

    name: str
    calls: Sequence[Callable[[Kernels], object]]
    bytes: int
    operations: int
    integer: bool


class KernelCases:
    """The cases of one model. context: tokens in the cache before what decodes. only: patterns of the names of those
    that are wanted; weights are made for these alone."""

    def __init__(self, config: ModelConfig, context: int, only: Sequence[str] = ("*",), seed: int = 0) -> None:
        self._config, self._context, self._only = config, context, only
        self._generator = torch.Generator().manual_seed(seed)

    def cases(self, tokens: Sequence[int]) -> Iterator[KernelCase]:
        """The kernels at each number of tokens a step."""
        for format in EXPERT_KINDS:
            yield from self._experts(format, tokens)
        config = self._config
        inner = config.moe_intermediate_size * config.n_shared_experts
        outputs = config.num_attention_heads * config.v_head_dim
        yield from self._linear("shared_gate_up", 2 * inner, config.hidden_size, tokens)
        yield from self._linear("shared_down", config.hidden_size, inner, tokens)
        yield from self._linear("attention_out", config.hidden_size, outputs, tokens)
        yield from self._linear("lm_head", config.vocab_size, config.hidden_size, tokens[:2])
        for count in tokens:
            if self._wanted("head_linear", [count]):
                yield self._head_linear(count)
            if self._wanted("mla_decode", [count]):
                yield self._decode_attention(count)
            if count > 1 and self._wanted("mla_prefill", [count]):
                yield self._prefill_attention(count)
            for case in self._rows(count):
                if self._matches(case.name):
                    yield case

    def _experts(self, format: str, tokens: Sequence[int]) -> Iterator[KernelCase]:
        if not (wanted := self._wanted(f"experts_{format}", tokens)):
            return
        config = self._config
        count, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        one = 2 * matrix_bytes(format, inner, hidden) + matrix_bytes(format, hidden, inner)
        layers = [self._layer(format) for _ in range(self._copies(count * one))]
        for rows in wanted:
            chosen = torch.stack([torch.randperm(count, generator=self._generator) for _ in range(rows)])
            pair_expert = chosen[:, : config.num_experts_per_tok].flatten().to(torch.int32)
            pair_token = torch.arange(rows, dtype=torch.int32).repeat_interleave(config.num_experts_per_tok)
            x = self._normal(rows, hidden)

            def call(kernels: Kernels, weights: ExpertWeights, x=x, token=pair_token, expert=pair_expert) -> object:
                return kernels.experts(kernels.quantize(x, ActivationFormat.INT8), token, expert, weights)

            pairs = len(pair_expert)
            yield KernelCase(
                f"experts_{format}.t{rows}",
                [_bound(call, layer) for layer in layers],
                len(pair_expert.unique()) * one + 4 * (rows + pairs) * hidden,
                2 * pairs * 3 * hidden * inner,
                integer=True,
            )

    def _layer(self, format: str) -> ExpertWeights:
        config, kind = self._config, EXPERT_KINDS[format]
        count, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        gate_up = random_matrix(kind, count, 2 * inner, hidden, self._generator)
        return ExpertWeights(gate_up, random_matrix(kind, count, hidden, inner, self._generator))

    def _linear(self, name: str, outputs: int, inner: int, tokens: Sequence[int]) -> Iterator[KernelCase]:
        """The same weight in INT4 (where its columns are whole groups), in INT8 and in bfloat16."""
        formats = {"int4": "w4a8", "int8": "w8a8", "bf16": "bf16"}
        if inner % INT4_GROUP:
            del formats["int4"]
        for format, matrices in formats.items():
            if not (wanted := self._wanted(f"linear_{format}.{name}", tokens)):
                continue
            size = matrix_bytes(matrices, outputs, inner)
            weights = [self._weight(format, outputs, inner) for _ in range(self._copies(size))]
            for rows in wanted:
                x = self._normal(rows, inner)

                def call(kernels: Kernels, weight: LinearWeight, x: Tensor = x) -> object:
                    return kernels.linear(x, weight)

                yield KernelCase(
                    f"linear_{format}.{name}.t{rows}",
                    [_bound(call, weight) for weight in weights],
                    size + 4 * rows * (inner + outputs),
                    2 * rows * outputs * inner,
                    integer=format != "bf16",
                )

    def _weight(self, format: str, outputs: int, inner: int) -> LinearWeight:
        if format == "bf16":
            return (self._normal(outputs, inner) * inner**-0.5).bfloat16()
        kind = Int4Matrix if format == "int4" else Int8Matrix
        matrix = random_matrix(kind, 1, outputs, inner, self._generator)
        if isinstance(matrix, Int4Matrix):
            return Int4Weight(matrix.nibbles[0], matrix.multipliers[0], matrix.scale[0])
        assert isinstance(matrix, Int8Matrix)
        return Int8Weight(matrix.values[0], matrix.scale[0])

    def _head_linear(self, rows: int) -> KernelCase:
        """The key up-projection, absorbed into the queries."""
        config = self._config
        heads, outputs, inner = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
        size = heads * outputs * inner
        weights = [self._normal(heads, outputs, inner).bfloat16() for _ in range(self._copies(2 * size))]
        x = self._normal(rows, heads, inner)
        calls = [_bound(lambda kernels, weight: kernels.head_linear(x, weight), weight) for weight in weights]
        moved = 2 * size + 4 * rows * heads * (inner + outputs)
        return KernelCase(f"head_linear.t{rows}", calls, moved, 2 * rows * size, integer=False)

    def _decode_attention(self, sequences: int) -> KernelCase:
        """A token of each sequence, `context` tokens in the cache."""
        visible = sequences * self._context
        return self._attention(f"mla_decode.t{sequences}", [1] * sequences, [self._context] * sequences, visible)

    def _prefill_attention(self, tokens: int) -> KernelCase:
        """A prompt of so many tokens."""
        return self._attention(f"mla_prefill.t{tokens}", [tokens], [tokens], tokens * (tokens + 1) // 2)

    def _attention(self, name: str, queries: list[int], contexts: list[int], visible: int) -> KernelCase:
        """visible: (query, entry) pairs."""
        config = self._config
        heads, width, rank = config.num_attention_heads, config.kv_width, config.kv_lora_rank
        batch, count = paged_batch(queries, contexts)
        q = self._normal(sum(queries), heads, width)
        # Pairs of bfloat16 are finite entries in every backend's own layout of a page.
        halves = (count, PAGE, 2 * width)
        copies = range(self._copies(4 * count * PAGE * width))
        layers = [self._normal(*halves).bfloat16().view(torch.float32) for _ in copies]
        calls = [
            _bound(lambda kernels, pages: kernels.mla_attention(q, pages, batch, width**-0.5, rank), pages)
            for pages in layers
        ]
        moved = 4 * sum(contexts) * width + 4 * sum(queries) * heads * (width + rank)
        return KernelCase(name, calls, moved, 2 * visible * heads * (width + rank), integer=False)

    def _rows(self, rows: int) -> Iterator[KernelCase]:
        """What is done to each row beside the products."""
        config = self._config
        hidden, vocabulary, chosen = config.hidden_size, config.vocab_size, config.num_experts_per_tok
        x, ones = self._normal(rows, hidden), torch.ones(hidden)
        gate = (self._normal(config.n_routed_experts, hidden) * hidden**-0.5).bfloat16()
        bias = torch.zeros(config.n_routed_experts)
        inner = self._normal(rows, 2 * config.moe_intermediate_size * config.n_shared_experts)
        slots, weights = self._normal(rows, chosen, hidden), torch.rand(rows, chosen)

        def case(name: str, call: Callable[[Kernels], object], values: int, operations: int) -> KernelCase:
            return KernelCase(f"{name}.t{rows}", [call], 4 * values, operations, integer=False)

        yield case("rms_norm", lambda kernels: kernels.rms_norm(x, ones, 1e-6), 2 * x.numel(), 3 * x.numel())
        yield case(
            "quantize", lambda kernels: kernels.quantize(x, ActivationFormat.INT8), 5 * x.numel() // 4, x.numel()
        )
        yield case(
            "gate",
            lambda kernels: kernels.gate(x, gate, bias, config.gate),
            x.numel() + gate.numel() // 2,
            2 * rows * gate.numel(),
        )
        yield case("silu_mul", lambda kernels: kernels.silu_mul(inner), 3 * inner.numel() // 2, inner.numel())
        yield case(
            "combine",
            lambda kernels: kernels.combine(slots, weights, x, x),
            slots.numel() + 3 * x.numel(),
            slots.numel(),
        )
        if rows <= 64:
            logits = self._normal(rows, vocabulary)
            greedy = [SamplingRow(0.0, 1.0, 0, 0, 0)] * rows
            yield case("sample_greedy", lambda kernels: kernels.sample(logits, greedy), logits.numel(), logits.numel())

    def _wanted(self, kernel: str, tokens: Sequence[int]) -> list[int]:
        """Of the numbers of tokens those at which the kernel is asked for."""
        return [count for count in tokens if self._matches(f"{kernel}.t{count}")]

    def _matches(self, name: str) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for pattern in self._only)

    def _copies(self, size: int) -> int:
        """Copies of weights of so many bytes."""
        return max(1, min(self._config.num_hidden_layers, -(-_COPIES_BYTES // size)))

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)


def paged_batch(queries: Sequence[int], contexts: Sequence[int]) -> tuple[PagedBatch, int]:
    """A batch whose sequences own pages in order, and the number of pages. contexts: tokens with the queries."""
    used = [-(-length // PAGE) for length in contexts]
    table = torch.full((len(contexts), max(used)), -1, dtype=torch.int32)
    begin = 0
    for row, count in enumerate(used):
        table[row, :count] = torch.arange(begin, begin + count, dtype=torch.int32)
        begin += count
    spans = [torch.arange(length - new, length) for new, length in zip(queries, contexts, strict=True)]
    positions = torch.cat(spans)
    owner = torch.repeat_interleave(torch.arange(len(queries)), torch.tensor(queries))
    slots = table[owner, positions // PAGE].to(torch.int64) * PAGE + positions % PAGE
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    chunks = tuple(
        Chunk(row, int(starts[row]), new, length)
        for row, (new, length) in enumerate(zip(queries, contexts, strict=True))
        if new > 1
    )
    return PagedBatch(starts, torch.tensor(contexts, dtype=torch.int32), table, positions, slots, chunks), begin


def _bound(call: Callable[..., object], weights: object) -> Callable[[Kernels], object]:
    return lambda kernels: call(kernels, weights)
