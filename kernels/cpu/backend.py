"""The CPU backend: C++ kernels through ctypes, float32 activations, one fixed thread pool.

Every sum runs in the order of `kernels/ordered.py`, so all operations give the reference's bits, on any CPU and with
any number of threads. The protocol promises that for INT8 experts alone, and the variant "amx" multiplies bfloat16
weights and attention another way (`splits_floats`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import ArgumentChecks, plain_experts, row_stride
from ..logit_changes import changed_logits
from ..protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    GateConfig,
    Graph,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    IntegerWeight,
    LayerExperts,
    LinearWeight,
    PagedBatch,
    Sampled,
    SamplingRow,
    T,
)
from ..sampling import SamplingRows, check_sampling
from ..single_expert import every_token, single_expert
from . import commands
from .arena import Arena
from .graph import CpuGraph, Recording
from .handle import CpuHandle

# Bytes of a result from which on its memory is kept for others: what the allocator gives back to the system, and the
# system clears, costs more than handing it on.
_WORTH_KEEPING = 1 << 16
_ENTRIES = {torch.float32: 0, torch.int8: 1, torch.float8_e4m3fn: 2}
_KINDS: dict[type, int] = {Int4Matrix: 0, Int8Matrix: 1, Fp8Matrix: 2, Bf16Matrix: 3}


class CpuKernels:
    """`Kernels` in C++ for x86-64 (AMX, AVX-512 VNNI, AVX2) and any other CPU (plain C++).

    threads: how many compute at once, the caller included. variant: "amx", "avx512", "avx2", "portable", or "" for the
    best that this CPU runs; the results are the same but for those that `splits_floats` names. kv_dtype: float32, int8
    or float8_e4m3fn. Calls from several Python threads are safe and share the pool. Not usable in a forked child.
    """

    name = "cpu"
    device = torch.device("cpu")
    activation_dtype = torch.float32
    query_dtype = torch.float32

    def __init__(self, threads: int, variant: str = "", kv_dtype: torch.dtype = torch.float32) -> None:
        self.kv_dtype, self._entries = kv_dtype, _ENTRIES[kv_dtype]
        self._handle = CpuHandle(threads, variant)
        self._check = ArgumentChecks(self.activation_dtype, self.device, kv_dtype)
        self._arena = Arena()
        self.threads, self.variant = threads, self._handle.variant
        self.splits_floats = self.variant == "amx"

    def close(self) -> None:
        """Ends the thread pool; no operation may run then or later. Also done when the object goes."""
        self._handle.close()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        at = self._at
        tokens, size = self._check.rms_norm(x, weight)
        out = self._empty(tokens, size)
        self._run(commands.rms_norm(
            at(x), at(weight), _type(weight), at(out), tokens, size, row_stride(x), float(eps), 0, 0,
        ))  # fmt: skip
        return out

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, floats: bool = True
    ) -> tuple[Tensor, Activations]:
        at = self._at
        tokens, size = self._check.rms_norm(x, weight)
        out = self._empty(tokens if floats else 0, size)
        values, scale = self._empty(tokens, size, dtype=torch.int8), self._empty(tokens)
        self._run(commands.rms_norm(
            at(x), at(weight), _type(weight), at(out) if floats else 0, tokens, size, row_stride(x), float(eps),
            at(values), at(scale),
        ))  # fmt: skip
        return out, Activations(ActivationFormat.INT8, values, scale)

    def linear(self, x: Tensor | Activations, weight: LinearWeight, residual: Tensor | None = None) -> Tensor:
        at = self._at
        if isinstance(weight, IntegerWeight):
            tokens, inner, outputs = self._check.integer_linear(x, weight, residual)
            out = self._empty(tokens, outputs)
            rows = (at(x), 0) if isinstance(x, Tensor) else (at(x.values), _optional(at, x.scale))
            self._run(commands.integer_linear(
                *rows, *_integers(at, weight), _optional(at, residual), at(out), tokens, inner, outputs,
            ))  # fmt: skip
            return out
        tokens, inner, outputs = self._check.linear("linear", x, weight, residual)
        assert isinstance(x, Tensor)
        out = self._empty(tokens, outputs)
        self._run(commands.linear(
            at(x), at(weight), _type(weight), _optional(at, residual), at(out),
            tokens, 1, inner, outputs, inner, outputs,
        ))  # fmt: skip
        return out

    def mlp(
        self, x: Activations, gate_up: IntegerWeight, down: IntegerWeight, residual: Tensor | None = None
    ) -> Tensor:
        self._check.residual("mlp", residual, len(x.values), len(down.scale))
        return self._experts(x, *every_token(len(x.values), self.device), single_expert(gate_up, down), residual)

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        at = self._at
        tokens, heads, inner, outputs = self._check.head_linear(x, weight)
        out = self._empty(tokens, heads, outputs)
        self._run(commands.linear(
            at(x), at(weight), _type(weight), 0, at(out), tokens, heads, inner, outputs, row_stride(x), outputs,
        ))  # fmt: skip
        return out

    def absorb(self, q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        at = self._at
        tokens, heads, inner, outputs, size, length = self._check.absorb(q, weight, positions, cos, sin)
        width, out = outputs + size, self._empty(tokens, heads, outputs + size)
        self._run(commands.linear(
            at(q), at(weight), _type(weight), 0, at(out), tokens, heads, inner, outputs, row_stride(q), width,
        ) + commands.rope(
            at(q) + inner * q.itemsize, at(positions), at(cos), at(sin), at(out) + outputs * out.itemsize,
            tokens, heads, size, row_stride(q), width, length,
        ))  # fmt: skip
        return out

    def write_kv(
        self,
        pages: Tensor,
        slots: Tensor,
        rows: Tensor,
        norm: Tensor,
        eps: float,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        at = self._at
        tokens, rank, rope, limit, length = self._check.write_kv(pages, slots, rows, norm, positions, cos, sin)
        self._run(commands.write_kv(
            at(pages), self._entries, at(slots), at(rows), at(norm), _type(norm), float(eps),
            at(positions), at(cos), at(sin), tokens, rank, rope, row_stride(rows), limit, length,
        ))  # fmt: skip

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        at = self._at
        queries, heads, width = self._check.mla_attention(q, pages, batch, kv_lora_rank)
        num_pages, page_size, _ = pages.shape
        sequences, max_pages = batch.page_table.shape
        out = self._empty(queries, heads, kv_lora_rank)
        self._run(commands.attention(
            at(batch.positions), num_pages, at(q), at(pages), self._entries, at(batch.query_start),
            at(batch.context_len), at(batch.page_table), at(out),
            sequences, queries, heads, width, kv_lora_rank, page_size, max_pages, float(scale),
        ))  # fmt: skip
        return out

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        at = self._at
        tokens, inner, experts = self._check.gate(x, weight, bias, config)
        ids = self._empty(tokens, config.top_k, dtype=torch.int32)
        weights = self._empty(tokens, config.top_k)
        self._run(commands.gate(
            at(x), at(weight), _type(weight), at(bias), at(ids), at(weights),
            tokens, inner, experts, config.top_k, config.n_group, config.topk_group,
            int(config.norm_topk_prob), float(config.routed_scaling_factor),
        ))  # fmt: skip
        return ids, weights

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        """A row with a NaN or an infinity becomes zeros with scale NaN, so that it stays visible."""
        at = self._at
        tokens, size = self._check.quantize(x)
        if format is ActivationFormat.FLOAT:
            return Activations(format, x, None)
        int8 = format is ActivationFormat.INT8
        values = self._empty(tokens, size, dtype=torch.int8 if int8 else torch.float8_e4m3fn)
        scale = self._empty(tokens)
        code = 1 if int8 else 2
        self._run(commands.quantize(at(x), code, at(values), at(scale), tokens, size))
        return Activations(format, values, scale)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        at = self._at
        tokens, size = self._check.silu_mul(gate_up)
        out = self._empty(tokens, size)
        self._run(commands.silu_mul(at(gate_up), at(out), tokens, size))
        return out

    def prepare(self, weights: ExpertWeights) -> ExpertWeights:
        return weights

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        return self._experts(x, pair_token, pair_expert, plain_experts(weights), None)

    def combine(self, slots: Tensor, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
        at = self._at
        tokens, top_k, size = self._check.combine(slots, weights, shared, residual)
        out = self._empty(tokens, size)
        self._run(commands.combine(
            at(slots), at(weights), at(shared), at(residual), at(out), tokens, top_k, size,
        ))  # fmt: skip
        return out

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> Sampled:
        at = self._at
        check_sampling(logits, rows)
        logits = logits.to(torch.float32).contiguous()
        changed, placed = changed_logits(logits, rows), rows if isinstance(rows, SamplingRows) else SamplingRows(rows)
        count, vocabulary = logits.shape
        columns = min(max((row.top_logprobs for row in rows), default=0), vocabulary)
        tokens, top_tokens = self._empty(count, dtype=torch.int64), self._empty(count, columns, dtype=torch.int64)
        logprobs, top_logprobs, largest = self._empty(count), self._empty(count, columns), self._empty(count, 2)
        self._run(commands.sample(
            at(logits), at(changed), at(placed.words), at(tokens), at(logprobs),
            at(top_tokens), at(top_logprobs), at(largest), count, vocabulary, columns,
        ))  # fmt: skip
        return Sampled(tokens, logprobs, top_tokens, top_logprobs)

    def take_rows(self, table: Tensor, rows: Tensor) -> Tensor:
        at = self._at
        count, size, length = self._check.take_rows(table, rows)
        out = self._empty(count, size)
        self._run(commands.take_rows(at(table), _type(table), at(rows), at(out), count, size, length))
        return out

    def capture(self, run: Callable[[], T], beside: Graph[object] | None = None) -> Graph[T]:
        if beside is not None and not isinstance(beside, CpuGraph):
            raise ValueError(f"capture: beside is a {type(beside).__name__}, expected a graph of this backend")
        return CpuGraph(self._handle, Arena() if beside is None else beside.arena, run)

    def joined(self, run: Callable[[], T]) -> T:
        recording = Recording(self._handle.thread.arena)
        with self._handle.recording(recording):
            result = run()
        self._handle.run(b"".join(recording.words))
        return result

    def _experts(
        self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: ExpertWeights, residual: Tensor | None
    ) -> Tensor:
        """residual: [P, D], only where weights are integers."""
        at, shapes = self._at, self._check.experts(x, pair_token, pair_expert, weights)
        out = self._empty(shapes.pairs, shapes.hidden)
        self._run(commands.experts(
            _KINDS[type(weights.gate_up)], at(x.values), _optional(at, x.scale), at(pair_token), at(pair_expert),
            *_matrix(at, weights.gate_up), *_matrix(at, weights.down), _optional(at, residual), at(out),
            shapes.tokens, shapes.pairs, shapes.experts, shapes.hidden, shapes.intermediate,
        ))  # fmt: skip
        return out

    def _run(self, words: bytes) -> None:
        recording = self._handle.thread.recording
        if recording is None:
            self._handle.run(words)
        else:
            recording.words.append(words)

    def _at(self, tensor: Tensor) -> int:
        """Its address, which a graph may go on to use."""
        recording = self._handle.thread.recording
        if recording is not None:
            recording.keep(tensor)
        return tensor.data_ptr()

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        recording = self._handle.thread.recording
        if recording is not None:
            return recording.arena.empty(shape, dtype)
        large = math.prod(shape) * dtype.itemsize >= _WORTH_KEEPING
        return self._arena.empty(shape, dtype) if large else torch.empty(shape, dtype=dtype)


def _type(weight: Tensor) -> int:
    """The library's code of a float dtype."""
    return int(weight.dtype is torch.bfloat16)


def _optional(at: Callable[[Tensor], int], tensor: Tensor | None) -> int:
    """Its address; 0 for none."""
    return 0 if tensor is None else at(tensor)


def _integers(at: Callable[[Tensor], int], weight: IntegerWeight) -> tuple[int, int, int, int]:
    """The library's code of the kind; addresses of values, multipliers (0 where there are none) and scale."""
    if isinstance(weight, Int4Weight):
        return _KINDS[Int4Matrix], at(weight.nibbles), at(weight.multipliers), at(weight.scale)
    return _KINDS[Int8Matrix], at(weight.values), 0, at(weight.scale)


def _matrix(at: Callable[[Tensor], int], matrix: ExpertMatrix) -> tuple[int, int, int]:
    """Addresses of values, multipliers and scale; 0 where the kind has none."""
    if isinstance(matrix, Int4Matrix):
        return at(matrix.nibbles), at(matrix.multipliers), at(matrix.scale)
    return at(matrix.values), 0, 0 if isinstance(matrix, Bf16Matrix) else at(matrix.scale)
