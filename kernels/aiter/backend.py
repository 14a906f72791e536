"""The operations that AITER runs. Activations are float32, as everywhere; most of AITER's kernels take bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import ArgumentChecks
from ..protocol import (
    ActivationFormat,
    Activations,
    ExpertWeights,
    GateConfig,
    Int8Weight,
    Kernels,
    LayerExperts,
    LinearWeight,
    PagedBatch,
)
from .attention import LATENT, ROPE, Lists, attend
from .experts import UNIT, AiterExperts, lay_out, run
from .key_lists import key_lists
from .package import INSTALLED, Aiter

MAX_TOP_K = 64
"""One lane of a wave keeps each chosen expert."""
GATE_GROUPS = (1, 8)
"""Of experts. For 2 and 4 too the gate is compiled, but there it ranks groups by a part of their experts."""
INNER_UNIT = 16


class AiterKernels:
    """Methods of `Kernels`, as it describes them. base: of the same device, for what AITER lacks: absorbed queries,
    entries of bfloat16 (the latent and then the key), the product before a gate and the rounding before an INT8 linear.
    library: by default the installed one, of which each function is imported when it is first called, which needs
    ROCm."""

    def __init__(self, base: Kernels, library: Aiter = INSTALLED, lists: Lists = key_lists) -> None:
        self._base, self._library, self._lists = base, library, lists
        self._check = ArgumentChecks(base.activation_dtype, base.device, torch.bfloat16, torch.bfloat16)

    def absorb(self, q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._base.absorb(q, weight, positions, cos, sin).to(torch.bfloat16)

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
        """The base's, at once: AITER's entries are the latent and then the rotated key too, and it has none that norms
        and rotates."""
        _, rank, rope, _, _ = self._check.write_kv(pages, slots, rows, norm, positions, cos, sin)
        _expect("write_kv", f"pages has entries of {rank} and {rope} values", (rank, rope) == (LATENT, ROPE))
        self._base.write_kv(pages, slots, rows, norm, eps, positions, cos, sin)

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        width = self._check.mla_attention(q, pages, batch, kv_lora_rank)[2]
        fits = (kv_lora_rank, width - kv_lora_rank) == (LATENT, ROPE)
        _expect("mla_attention", f"pages has entries of {kv_lora_rank} and {width - kv_lora_rank} values", fits)
        return attend(self._library, self._lists, q.to(torch.bfloat16), pages, batch, float(scale)).to(torch.float32)

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        tokens, _, _ = self._check.gate(x, weight, bias, config)
        fits = config.n_group in GATE_GROUPS and config.top_k <= MAX_TOP_K
        _expect("gate", f"n_group is {config.n_group} and top_k {config.top_k}", fits)
        ids = torch.empty((tokens, config.top_k), dtype=torch.int32, device=x.device)
        weights = torch.empty((tokens, config.top_k), dtype=torch.float32, device=x.device)
        if tokens:
            self._library.call(
                "biased_grouped_topk",
                gating_output=self._base.linear(x, weight),
                correction_bias=bias,
                topk_weights=weights,
                topk_ids=ids,
                num_expert_group=config.n_group,
                topk_group=config.topk_group,
                need_renorm=config.norm_topk_prob,
                routed_scaling_factor=float(config.routed_scaling_factor),
            )
        return ids, weights

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        self._check.rms_norm(x, weight)
        return self._norm(x, weight, eps).to(torch.float32)

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, floats: bool = True
    ) -> tuple[Tensor, Activations]:
        self._check.rms_norm(x, weight)
        normed = self._norm(x, weight, eps)
        return (normed if floats else normed[:0]).to(torch.float32), self._int8(normed)

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        """FP8 is the base's: AITER's on gfx942 is e4m3fnuz, whose largest code is a NaN in what travels."""
        if format is not ActivationFormat.INT8:
            return self._base.quantize(x, format)
        self._check.quantize(x)
        return self._int8(x.to(torch.bfloat16))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        tokens, size = self._check.silu_mul(gate_up)
        out = torch.empty((tokens, size), dtype=torch.bfloat16, device=gate_up.device)
        if out.numel():
            self._library.call("silu_and_mul", out=out, input=gate_up.to(torch.bfloat16))
        return out.to(torch.float32)

    def linear(self, x: Tensor | Activations, weight: LinearWeight, residual: Tensor | None = None) -> Tensor:
        """An `Int8Weight` alone. K is never split, so that sums are exact; the result is rounded to bfloat16."""
        if not isinstance(weight, Int8Weight):
            raise ValueError(f"linear: weight is {type(weight).__name__}, expected Int8Weight")
        tokens, inner, outputs = self._check.integer_linear(x, weight, residual)
        _expect("linear", f"weight.values has K = {inner}", inner % INNER_UNIT == 0)
        if not tokens:
            return torch.empty((0, outputs), dtype=torch.float32, device=weight.scale.device)
        rows = x if isinstance(x, Activations) else self._base.quantize(x, ActivationFormat.INT8)
        assert rows.scale is not None
        out = self._library.call(
            "gemm_a8w8",
            XQ=rows.values,
            WQ=weight.values,
            x_scale=rows.scale[:, None],
            w_scale=weight.scale[None],
            dtype=torch.bfloat16,
            splitK=0,
        ).to(torch.float32)
        return out if residual is None else residual + out

    def prepare(self, weights: ExpertWeights) -> AiterExperts:
        """Experts in AITER's shuffled layout, FP8 as e4m3fnuz."""
        for name, matrix in (("weights.gate_up", weights.gate_up), ("weights.down", weights.down)):
            _, rows, inner = self._check.expert_matrix(name, matrix)
            _expect("experts", f"{name} has N = {rows} and K = {inner}", rows % UNIT == 0 and inner % UNIT == 0)
        return lay_out(self._library, weights)

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        """Weights that `prepare` has not laid out are laid out anew by each call. Experts below 0 are left out."""
        if isinstance(weights, ExpertWeights):
            self._check.experts(x, pair_token, pair_expert, weights)
            weights = self.prepare(weights)
        if not isinstance(weights, AiterExperts):
            raise ValueError(f"experts: weights is {type(weights).__name__}, another backend's layout of ExpertWeights")
        shapes = self._check.prepared_experts(x, pair_token, pair_expert, weights.gate_up, weights.down)
        if shapes.pairs == 0:
            return torch.zeros((0, shapes.hidden), dtype=torch.float32, device=x.values.device)
        return run(self._library, x, pair_token, pair_expert, weights)

    def _norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.to(torch.bfloat16).contiguous()
        if not rows.numel():
            return rows
        return self._library.call("rms_norm", input=rows, weight=weight.to(torch.bfloat16), epsilon=float(eps))

    def _int8(self, x: Tensor) -> Activations:
        if not x.numel():
            return self._base.quantize(x.to(torch.float32), ActivationFormat.INT8)
        values, scale = self._library.call("per_token_quant_hip", x=x, quant_dtype=torch.int8)
        return Activations(ActivationFormat.INT8, values, scale[:, 0])


def _expect(operation: str, found: str, fits: bool) -> None:
    if not fits:
        raise ValueError(f"{operation}: {found}, which AITER does not run")


__all__ = ["GATE_GROUPS", "INNER_UNIT", "MAX_TOP_K", "AiterKernels"]
