"""The CPU backend: C++ kernels through ctypes, float32 activations, one fixed thread pool.

Every sum runs in the order of `kernels/ordered.py`, so today all operations give the reference's bits, on any CPU
and with any number of threads. The protocol promises that for INT8 experts alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import ArgumentChecks
from ..protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    GateConfig,
    Int4Matrix,
    Int8Matrix,
    Int8Weight,
    LinearWeight,
    PagedBatch,
    Sampled,
    SamplingRow,
)
from ..sampling import sample
from . import commands
from .handle import CpuHandle

_KINDS: dict[type, int] = {Int4Matrix: 0, Int8Matrix: 1, Fp8Matrix: 2, Bf16Matrix: 3}


class CpuKernels:
    """`Kernels` in C++ for x86-64 (AVX-512 VNNI, AVX2) and any other CPU (plain C++).

    threads: how many compute at once, the caller included. variant: "avx512", "avx2", "portable", or "" for the best
    that this CPU runs; the results are the same. Calls from several Python threads are safe and share the pool. Not
    usable in a forked child.
    """

    name = "cpu"
    device = torch.device("cpu")
    activation_dtype = torch.float32

    def __init__(self, threads: int, variant: str = "") -> None:
        self._handle = CpuHandle(threads, variant)
        self._run = self._handle.run
        self._check = ArgumentChecks(self.activation_dtype, self.device)
        self.threads, self.variant = threads, self._handle.variant

    def close(self) -> None:
        """Ends the thread pool; no operation may run then or later. Also done when the object goes."""
        self._handle.close()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        tokens, size = self._check.rms_norm(x, weight)
        out = _empty(tokens, size)
        self._run(commands.rms_norm(x.data_ptr(), *_weight(weight), out.data_ptr(), tokens, size, float(eps)))
        return out

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        if isinstance(weight, Int8Weight):
            tokens, inner, outputs = self._check.linear_int8(x, weight)
            out = _empty(tokens, outputs)
            values, scale = weight.values.data_ptr(), weight.scale.data_ptr()
            self._run(commands.linear_int8(x.data_ptr(), values, scale, out.data_ptr(), tokens, inner, outputs))
            return out
        tokens, inner, outputs = self._check.linear("linear", x, weight)
        out = _empty(tokens, outputs)
        self._run(commands.linear(x.data_ptr(), *_weight(weight), out.data_ptr(), tokens, 1, inner, outputs))
        return out

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens, heads, inner, outputs = self._check.head_linear(x, weight)
        out = _empty(tokens, heads, outputs)
        self._run(commands.linear(x.data_ptr(), *_weight(weight), out.data_ptr(), tokens, heads, inner, outputs))
        return out

    def rope(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, size, length = self._check.rope(x, positions, cos, sin)
        out = _empty(tokens, heads, size)
        self._run(commands.rope(
            x.data_ptr(), positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
            tokens, heads, size, length,
        ))  # fmt: skip
        return out

    def write_kv(self, pages: Tensor, slots: Tensor, latent: Tensor, k_rope: Tensor) -> None:
        tokens, rank, rope, limit = self._check.write_kv(pages, slots, latent, k_rope)
        self._run(
            commands.write_kv(
                pages.data_ptr(), slots.data_ptr(), latent.data_ptr(), k_rope.data_ptr(), tokens, rank, rope, limit
            )
        )

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        queries, heads, width = self._check.mla_attention(q, pages, batch, kv_lora_rank)
        num_pages, page_size, _ = pages.shape
        sequences, max_pages = batch.page_table.shape
        out = _empty(queries, heads, kv_lora_rank)
        self._run(commands.attention(
            batch.positions.data_ptr(), num_pages, q.data_ptr(), pages.data_ptr(), batch.query_start.data_ptr(),
            batch.context_len.data_ptr(), batch.page_table.data_ptr(), out.data_ptr(),
            sequences, queries, heads, width, kv_lora_rank, page_size, max_pages, float(scale),
        ))  # fmt: skip
        return out

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        tokens, inner, experts = self._check.gate(x, weight, bias, config)
        ids = torch.empty(tokens, config.top_k, dtype=torch.int32)
        weights = _empty(tokens, config.top_k)
        self._run(commands.gate(
            x.data_ptr(), *_weight(weight), bias.data_ptr(), ids.data_ptr(), weights.data_ptr(),
            tokens, inner, experts, config.top_k, config.n_group, config.topk_group,
            int(config.norm_topk_prob), float(config.routed_scaling_factor),
        ))  # fmt: skip
        return ids, weights

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        """A row with a NaN or an infinity becomes zeros with scale NaN, so that it stays visible."""
        tokens, size = self._check.quantize(x)
        if format is ActivationFormat.FLOAT:
            return Activations(format, x, None)
        int8 = format is ActivationFormat.INT8
        values = torch.empty(tokens, size, dtype=torch.int8 if int8 else torch.float8_e4m3fn)
        scale = _empty(tokens)
        code = 1 if int8 else 2
        self._run(commands.quantize(x.data_ptr(), code, values.data_ptr(), scale.data_ptr(), tokens, size))
        return Activations(format, values, scale)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        tokens, size = self._check.silu_mul(gate_up)
        out = _empty(tokens, size)
        self._run(commands.silu_mul(gate_up.data_ptr(), out.data_ptr(), tokens, size))
        return out

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: ExpertWeights) -> Tensor:
        shapes = self._check.experts(x, pair_token, pair_expert, weights)
        out = _empty(shapes.pairs, shapes.hidden)
        self._run(commands.experts(
            _KINDS[type(weights.gate_up)], x.values.data_ptr(), 0 if x.scale is None else x.scale.data_ptr(),
            pair_token.data_ptr(), pair_expert.data_ptr(),
            *_matrix(weights.gate_up), *_matrix(weights.down), out.data_ptr(),
            shapes.tokens, shapes.pairs, shapes.experts, shapes.hidden, shapes.intermediate,
        ))  # fmt: skip
        return out

    def combine(self, slots: Tensor, weights: Tensor) -> Tensor:
        tokens, top_k, size = self._check.combine(slots, weights)
        out = _empty(tokens, size)
        self._run(commands.combine(slots.data_ptr(), weights.data_ptr(), out.data_ptr(), tokens, top_k, size))
        return out

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> Sampled:
        return sample(logits, rows)


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _weight(weight: Tensor) -> tuple[int, int]:
    """Address and type code."""
    return weight.data_ptr(), int(weight.dtype is torch.bfloat16)


def _matrix(matrix: ExpertMatrix) -> tuple[int, int, int]:
    """Addresses of values, multipliers and scale; 0 where the kind has none."""
    if isinstance(matrix, Int4Matrix):
        return matrix.nibbles.data_ptr(), matrix.multipliers.data_ptr(), matrix.scale.data_ptr()
    return matrix.values.data_ptr(), 0, 0 if isinstance(matrix, Bf16Matrix) else matrix.scale.data_ptr()
