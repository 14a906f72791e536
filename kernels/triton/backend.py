"""The GPU backend: Triton kernels of one source for CUDA and ROCm, float32 activations.

INT8 and INT4 products, rounding, SiLU, combining and rotary embedding give the reference's bits. No operation but
`sample` waits for the device, so numbers in tensors are not checked. An index outside its tensor is not followed: rows
and angles become NaN, entries are not written, pairs of unknown experts are left out; only pair_token is trusted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import ArgumentChecks
from ..kv_entries import ROUNDED
from ..protocol import (
    ActivationFormat,
    Activations,
    Chunk,
    Drawn,
    ExpertWeights,
    GateConfig,
    Graph,
    IntegerWeight,
    LayerExperts,
    LinearWeight,
    PagedBatch,
    Sampled,
    SamplingRow,
    T,
)
from ..single_expert import single_expert
from . import rows as row_kernels
from .absorb import absorb
from .attention import attention_tile, mla_attention
from .attention_expanded import expanded_attention, expanded_tile
from .branches import BRANCH_ROWS, Branches
from .drawing import draw
from .experts import run_experts
from .float_linear import float_parts, head_linear, linear
from .gate import choose
from .graph import TritonGraph
from .layouts import TiledExperts, tile_experts
from .linear import gated_hidden, integer_linear
from .linear_tiles import linear_tuning
from .quantize import quantize
from .sampling import sample_rows
from .tiles import TileTable, gpu_name

_CHOSEN_OF_PARTS = 512
"""Up to so many rows the gate's chooser itself adds the chunks of K: a launch less, for some memory."""


class TritonKernels:
    """`Kernels` on one GPU. device: which, such as cuda:0, or "meta" to ask for names and sizes alone, or to record
    launches (`recording`). gpu: its name in the table of tiles; the device's own where it is empty. Raises ValueError
    where torch has no such GPU.

    kv_dtype: bfloat16; int8 or float8_e4m3fn; or float32, whose pages take twice the memory and several times the time,
    for results that stand no further off the reference than `splits_floats` says.

    branch_rows: up to so many rows branches run beside what is called after them; no bit depends on it."""

    name = "triton"
    activation_dtype = torch.float32
    splits_floats = True
    leaves_out = True

    def __init__(
        self,
        device: torch.device,
        kv_dtype: torch.dtype = torch.bfloat16,
        gpu: str = "",
        branch_rows: int = BRANCH_ROWS,
    ) -> None:
        described = device.type == "meta"
        if not described and (device.type != "cuda" or not torch.cuda.is_available()):
            raise ValueError(f"device is {device}, expected a GPU that torch can use, such as cuda:0")
        if kv_dtype not in (torch.bfloat16, torch.float32, *ROUNDED):
            raise ValueError(f"kv_dtype is {kv_dtype}, expected bfloat16, float32, int8 or float8_e4m3fn")
        self.device, self.kv_dtype = device, kv_dtype
        self.query_dtype = torch.float32 if kv_dtype is torch.float32 else torch.bfloat16
        self._check = ArgumentChecks(self.activation_dtype, device, kv_dtype, self.query_dtype)
        gpu = gpu or ("default" if described else gpu_name(device))
        self._tiles, self._linears = TileTable.of(gpu), linear_tuning(gpu, device)
        self.branch_rows, self._branches = branch_rows, Branches(device)
        self._attention, self._expanded = attention_tile(kv_dtype, gpu), expanded_tile(gpu)

    def prepare(self, weights: ExpertWeights) -> TiledExperts:
        """The experts of one layer in the layout that `experts` multiplies; made once, on loading."""
        for name, matrix in (("weights.gate_up", weights.gate_up), ("weights.down", weights.down)):
            self._check.expert_matrix(name, matrix)
        return tile_experts(weights)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._check.rms_norm(x, weight)
        return row_kernels.rms_norm(x, weight, float(eps))

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, floats: bool = True
    ) -> tuple[Tensor, Activations]:
        self._check.rms_norm(x, weight)
        return row_kernels.rms_norm_quantize(x, weight, float(eps), floats)

    def linear(self, x: Tensor | Activations, weight: LinearWeight, residual: Tensor | None = None) -> Tensor:
        if isinstance(weight, IntegerWeight):
            self._check.integer_linear(x, weight, residual)
            rows = x if isinstance(x, Activations) else quantize(x, ActivationFormat.INT8)
            return integer_linear(rows, weight, self._linears, residual=residual)
        self._check.linear("linear", x, weight, residual)
        assert isinstance(x, Tensor)
        return linear(x, weight, self._linears, residual)

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        self._check.head_linear(x, weight)
        return head_linear(x.contiguous(), weight, self._linears)

    def mlp(
        self, x: Activations, gate_up: IntegerWeight, down: IntegerWeight, residual: Tensor | None = None
    ) -> Tensor:
        nobody = torch.empty(0, dtype=torch.int32, device=self.device)
        self._check.experts(x, nobody, nobody, single_expert(gate_up, down))
        self._check.residual("mlp", residual, len(x.values), len(down.scale))
        hidden = gated_hidden(x, gate_up, self._linears)
        return integer_linear(hidden, down, self._linears, in_turn=True, residual=residual)

    def absorb(self, q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        self._check.absorb(q, weight, positions, cos, sin)
        return absorb(q.contiguous(), weight, positions, cos, sin, self.query_dtype, self._linears.amd)

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
        self._check.write_kv(pages, slots, rows, norm, positions, cos, sin)
        row_kernels.write_kv(pages, slots, rows, norm, float(eps), positions, cos, sin)

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        self._check.mla_attention(q, pages, batch, kv_lora_rank)
        return mla_attention(q.to(self.query_dtype), pages, batch, float(scale), kv_lora_rank, self._attention)

    def expanded_attention(
        self,
        q: Tensor,
        pages: Tensor,
        batch: PagedBatch,
        chunk: Chunk,
        up_key: Tensor,
        up_value: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        out: Tensor,
    ) -> None:
        """Pages of float32 are for results that stand no further off the reference than `splits_floats` says; these
        are in bfloat16, and refused."""
        if self.kv_dtype is torch.float32:
            raise ValueError("expanded_attention: pages is float32, expected bfloat16, int8 or float8_e4m3fn")
        q = q.contiguous()
        shapes = self._check.expanded_attention(q, pages, batch, chunk, up_key, up_value, cos, sin, out)
        given = q, pages, batch, chunk, up_key, up_value, cos, sin, float(scale), out
        expanded_attention(*given, shapes, self._expanded)

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        self._check.gate(x, weight, bias, config)
        if len(x) > _CHOSEN_OF_PARTS:
            return choose(linear(x, weight, self._linears)[None], bias, config)
        return choose(float_parts(x, weight, self._linears), bias, config)

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        """A row with a NaN or an infinity becomes zeros with scale NaN, so that it stays visible."""
        self._check.quantize(x)
        return Activations(format, x, None) if format is ActivationFormat.FLOAT else quantize(x, format)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        self._check.silu_mul(gate_up)
        return row_kernels.silu_mul(gate_up)

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        """Weights that `prepare` has not laid out are laid out anew by each call, which takes longer than the product:
        a model prepares its own."""
        if isinstance(weights, ExpertWeights):
            self._check.experts(x, pair_token, pair_expert, weights)
            weights = self.prepare(weights)
        if not isinstance(weights, TiledExperts):
            raise ValueError(f"experts: weights is {type(weights).__name__}, another backend's layout of ExpertWeights")
        shapes = self._check.prepared_experts(x, pair_token, pair_expert, weights.gate_up, weights.down)
        return run_experts(x, pair_token, pair_expert, weights, shapes, self._tiles)

    def combine(self, slots: Tensor, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
        self._check.combine(slots, weights, shared, residual)
        return row_kernels.combine(slots, weights, shared, residual)

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> Sampled:
        return sample_rows(logits, rows)

    def draw(self, logits: Tensor, words: Tensor) -> Drawn:
        return draw(logits, words)

    def take_rows(self, table: Tensor, rows: Tensor) -> Tensor:
        self._check.take_rows(table, rows)
        return row_kernels.take_rows(table, rows)

    def capture(self, run: Callable[[], T], beside: Graph[object] | None = None) -> Graph[T]:
        """`run` is called twice, once to compile its kernels and once recorded."""
        if beside is not None and not isinstance(beside, TritonGraph):
            raise ValueError(f"capture: beside is a {type(beside).__name__}, expected a graph of this backend")
        return TritonGraph(run, beside, self._branches)

    def branch(self, rows: int, run: Callable[[], T]) -> T:
        return run() if rows > self.branch_rows else self._branches.run(run)

    def join(self) -> None:
        self._branches.join()


__all__ = ["TritonKernels"]
