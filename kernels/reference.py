"""The oracle: every operation of the kernel protocol in plain PyTorch, float32, slow and easy to read.

All sums run in the fixed order of `ordered`, so this backend is batch invariant by construction, and a backend that
keeps the same order gives the same bits. An accelerator does too: every rounding is one of IEEE arithmetic, and
divisors are tensors on the device, since by a number torch multiplies with the reciprocal there. `expanded_attention`
alone has sums in torch's own order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import ArgumentChecks, check_indices, check_paged_batch, plain_experts
from .kv_entries import ROUNDED, pack_entries, unpack_entries
from .ordered import ordered_exp, ordered_linear, ordered_sigmoid, ordered_silu, ordered_sum
from .protocol import (
    ActivationFormat,
    Activations,
    Chunk,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    GateConfig,
    Graph,
    Int4Matrix,
    Int8Matrix,
    Int8Weight,
    IntegerWeight,
    LayerExperts,
    LinearWeight,
    PagedBatch,
    Sampled,
    SamplingRow,
    T,
)
from .repeated_graph import RepeatedGraph
from .sampling import sample
from .single_expert import every_token, single_expert

ATTENTION_BLOCK = 64
"""Keys a step of the online softmax; blocks begin at multiples of it from position 0, whatever the pages and chunks."""
INT8_MAX = 127.0
FP8_MAX = 448.0

_CPU = torch.device("cpu")


class ReferenceKernels:
    """`Kernels` in plain PyTorch. Runs on torch's own intra-op threads; the results do not depend on their number.

    kv_dtype: float32, bfloat16, int8 or float8_e4m3fn."""

    name = "reference"
    activation_dtype = torch.float32
    query_dtype = torch.float32
    splits_floats = False

    def __init__(self, device: torch.device = _CPU, kv_dtype: torch.dtype = torch.float32) -> None:
        self.device, self.kv_dtype = device, kv_dtype
        self._check = ArgumentChecks(self.activation_dtype, device, kv_dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = self._check.rms_norm(x, weight)[1]
        mean = ordered_sum(x * x) / torch.tensor(size, dtype=torch.float32, device=self.device)
        # torch's float32 square root is not always the nearest number; through float64 it is.
        root = torch.sqrt((mean + eps).to(torch.float64)).to(torch.float32)
        inverse = torch.ones_like(mean) / root
        return x * inverse[:, None] * weight.to(torch.float32)

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, floats: bool = True
    ) -> tuple[Tensor, Activations]:
        normed = self.rms_norm(x, weight, eps)
        return normed if floats else normed[:0], self.quantize(normed, ActivationFormat.INT8)

    def linear(self, x: Tensor | Activations, weight: LinearWeight, residual: Tensor | None = None) -> Tensor:
        if isinstance(weight, IntegerWeight):
            self._check.integer_linear(x, weight, residual)
            rows = x if isinstance(x, Activations) else self.quantize(x, ActivationFormat.INT8)
            assert rows.scale is not None
            integers = weight.values if isinstance(weight, Int8Weight) else _join(weight.nibbles, weight.multipliers)
            product = _integer_sums(rows, integers) * (rows.scale[:, None] * weight.scale[None, :])
        else:
            self._check.linear("linear", x, weight, residual)
            assert isinstance(x, Tensor)
            product = ordered_linear(x, weight)
        return product if residual is None else residual + product

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        self._check.head_linear(x, weight)
        return torch.stack([ordered_linear(x[:, h], weight[h]) for h in range(x.shape[1])], dim=1)

    def mlp(
        self, x: Activations, gate_up: IntegerWeight, down: IntegerWeight, residual: Tensor | None = None
    ) -> Tensor:
        product = self.experts(x, *every_token(len(x.values), self.device), single_expert(gate_up, down))
        self._check.residual("mlp", residual, *product.shape)
        return product if residual is None else residual + product

    def absorb(self, q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        *_, inner, _, _, length = self._check.absorb(q, weight, positions, cos, sin)
        check_indices("absorb", "positions", positions, length)
        rotated = rotate(q[..., inner:], positions, cos, sin)
        return torch.cat([self.head_linear(q[..., :inner], weight), rotated], dim=-1)

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
        _, rank, _, limit, length = self._check.write_kv(pages, slots, rows, norm, positions, cos, sin)
        check_indices("write_kv", "slots", slots, limit)
        check_indices("write_kv", "positions", positions, length)
        latent, key = self.rms_norm(rows[:, :rank], norm, eps), rotate(rows[:, None, rank:], positions, cos, sin)[:, 0]
        if self.kv_dtype in ROUNDED:
            entries = pack_entries(self.quantize(latent, ROUNDED[self.kv_dtype]), key)
            pages.view(torch.uint8).view(limit, -1)[slots] = entries
        else:
            pages.view(limit, -1)[slots] = torch.cat([latent, key], dim=1).to(self.kv_dtype)

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        queries, heads, width = self._check.mla_attention(q, pages, batch, kv_lora_rank)
        check_paged_batch(batch, pages.shape[0], pages.shape[1], queries)
        result = q.new_zeros(queries, heads, kv_lora_rank)
        starts = batch.query_start.tolist()
        for sequence, length in enumerate(batch.context_len.tolist()):
            rows = slice(starts[sequence], starts[sequence + 1])
            if rows.start == rows.stop:
                continue
            keys, sizes = self._entries(pages, batch.page_table[sequence], length, kv_lora_rank, width - kv_lora_rank)
            result[rows] = _attend(q[rows], keys, sizes, scale, kv_lora_rank)
        return result

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
        """By torch's own matrix products, in float32, head by head: these sums alone have no order of ours."""
        shapes = self._check.expanded_attention(q, pages, batch, chunk, up_key, up_value, cos, sin, out)
        check_paged_batch(batch, pages.shape[0], pages.shape[1], len(q))
        check_indices("expanded_attention", "positions", batch.positions, len(cos))
        rows, past = slice(chunk.first, chunk.first + chunk.rows), chunk.context - chunk.rows
        entries, sizes = self._entries(pages, batch.page_table[chunk.sequence], chunk.context, shapes.rank, shapes.rope)
        latent, key = entries.split([shapes.rank, shapes.rope], dim=1)
        latent = latent if sizes is None else latent * sizes[:, None]
        turned = rotate(q[rows, :, shapes.inner :], batch.positions[rows], cos, sin)
        hidden = torch.ones(chunk.rows, chunk.context, dtype=torch.bool, device=self.device).triu(past + 1)
        result = out[rows].view(chunk.rows, shapes.heads, shapes.value)
        for head in range(shapes.heads):
            scores = q[rows, head, : shapes.inner] @ (latent @ up_key[head].to(torch.float32)).T
            scores = (scores + turned[:, head] @ key.T) * scale
            share = scores.masked_fill(hidden, -torch.inf).softmax(dim=1)
            result[:, head] = share @ (latent @ up_value[head].to(torch.float32).T)

    def _entries(self, pages: Tensor, table: Tensor, length: int, rank: int, rope: int) -> tuple[Tensor, Tensor | None]:
        """The first `length` entries of the sequence with the pages `table`, [length, L + R] float32, and what the
        latents of 8-bit pages are multiplied by, [length]."""
        stored = pages.view(torch.uint8) if self.kv_dtype in ROUNDED else pages
        used = -(-length // pages.shape[1])
        entries = stored[table[:used].long()].flatten(0, 1)[:length].view(self.kv_dtype)
        if self.kv_dtype in ROUNDED:
            return unpack_entries(entries, rank, rope)
        return entries.to(torch.float32), None

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        tokens, _, experts = self._check.gate(x, weight, bias, config)
        scores = ordered_sigmoid(ordered_linear(x, weight))
        choice = _nan_last(scores + bias)
        if config.n_group > 1:
            grouped = choice.view(tokens, config.n_group, experts // config.n_group)
            best_two = grouped.sort(dim=-1, descending=True).values[..., :2]
            group_scores = _nan_last(best_two[..., 0] + best_two[..., 1])
            groups = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, : config.topk_group]
            closed = torch.ones(tokens, config.n_group, dtype=torch.bool, device=self.device).scatter_(1, groups, False)
            choice = grouped.masked_fill(closed[..., None], -torch.inf).view(tokens, experts)
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : config.top_k]
        weights = scores.gather(1, ids)
        if config.norm_topk_prob:
            total = weights.new_zeros(tokens)
            for slot in weights.unbind(1):
                total = total + slot
            weights = weights / (total + 1e-20)[:, None]
        return ids.to(torch.int32), weights * config.routed_scaling_factor

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        """A row with a NaN or an infinity becomes zeros with scale NaN, so that it stays visible."""
        tokens = self._check.quantize(x)[0]
        if format is ActivationFormat.FLOAT:
            return Activations(format, x, None)
        limit = INT8_MAX if format is ActivationFormat.INT8 else FP8_MAX
        largest = x.abs().amax(dim=1) if x.numel() else x.new_zeros(tokens)
        scale = torch.where(largest.isfinite(), largest / torch.full_like(largest, limit), torch.nan)
        usable = ((scale > 0) & scale.isfinite())[:, None]
        scaled = torch.where(usable, x / scale[:, None], 0.0).clamp(-limit, limit)
        if format is ActivationFormat.INT8:
            return Activations(format, scaled.round().to(torch.int8), scale)
        return Activations(format, scaled.to(torch.float8_e4m3fn), scale)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        size = self._check.silu_mul(gate_up)[1]
        return ordered_silu(gate_up[:, :size]) * gate_up[:, size:]

    def prepare(self, weights: ExpertWeights) -> ExpertWeights:
        return weights

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        """INT8 epilogue, in this order: float32(integer sum) * activation scale * weight scale."""
        weights = plain_experts(weights)
        shapes = self._check.experts(x, pair_token, pair_expert, weights)
        check_indices("experts", "pair_token", pair_token, shapes.tokens)
        check_indices("experts", "pair_expert", pair_expert, shapes.experts)
        result = torch.zeros(shapes.pairs, shapes.hidden, dtype=torch.float32, device=self.device)
        for expert in pair_expert.unique().tolist():
            pairs = (pair_expert == expert).nonzero()[:, 0]
            rows = _take(x, pair_token[pairs].long())
            hidden = self.silu_mul(_multiply(rows, weights.gate_up, expert))
            result[pairs] = _multiply(self.quantize(hidden, x.format), weights.down, expert)
        return result

    def combine(self, slots: Tensor, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
        tokens, top_k, size = self._check.combine(slots, weights, shared, residual)
        result = slots.new_zeros(tokens, size)
        for slot in range(top_k):
            result = result + slots[:, slot] * weights[:, slot, None]
        return residual + (result + shared)

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> Sampled:
        return sample(logits, rows)

    def take_rows(self, table: Tensor, rows: Tensor) -> Tensor:
        length = self._check.take_rows(table, rows)[2]
        check_indices("take_rows", "rows", rows, length)
        return table[rows].to(torch.float32)

    def capture(self, run: Callable[[], T], beside: Graph[object] | None = None) -> Graph[T]:
        return RepeatedGraph(run)


def rotate(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (2i, 2i + 1): x [T, H, R], positions [T], cos and sin [length, R/2] -> the
    rotated pairs in their places, [T, H, R]."""
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)


def _attend(q: Tensor, keys: Tensor, sizes: Tensor | None, scale: float, rank: int) -> Tensor:
    """Causal online softmax of q [n, H, W] over keys [C, W], the last query seeing all C -> [n, H, rank]. sizes: [C],
    what the first `rank` columns of keys are multiplied by, if anything."""
    count, heads, width = q.shape
    visible = torch.arange(keys.shape[0] - count + 1, keys.shape[0] + 1, device=q.device)[:, None, None]
    largest = q.new_full((count, heads, 1), -torch.inf)
    total = q.new_zeros(count, heads, 1)
    result = q.new_zeros(count, heads, rank)
    for begin in range(0, keys.shape[0], ATTENTION_BLOCK):
        block = keys[begin : begin + ATTENTION_BLOCK]
        size = block.shape[0]
        block_sizes = None if sizes is None else sizes[begin : begin + ATTENTION_BLOCK]
        scores = _scores(q.reshape(count * heads, width), block, block_sizes, rank).view(count, heads, size) * scale
        seen = torch.arange(begin, begin + size, device=q.device) < visible
        open_rows = visible > begin
        raised = torch.maximum(largest, scores.masked_fill(~seen, -torch.inf).amax(dim=2, keepdim=True))
        decay = torch.where(largest == -torch.inf, 0.0, ordered_exp(largest - raised))
        share = torch.where(seen, ordered_exp(scores - raised), 0.0)
        block_total = ordered_sum(share.view(-1, size)).view(count, heads, 1)
        total = torch.where(open_rows, total * decay + block_total, total)
        result = torch.where(open_rows, result * decay, result)
        if block_sizes is not None:
            share = share * block_sizes
        for key in range(size):
            added = result + share[..., key, None] * block[key, :rank]
            result = torch.where(seen[..., key, None], added, result)
        largest = torch.where(open_rows, raised, largest)
    return result / total


def _scores(q: Tensor, keys: Tensor, sizes: Tensor | None, rank: int) -> Tensor:
    """q [N, W] times keys [B, W], as `_attend` has them -> [N, B]."""
    if sizes is None:
        return ordered_linear(q, keys)
    return ordered_linear(q[:, :rank], keys[:, :rank]) * sizes + ordered_linear(q[:, rank:], keys[:, rank:])


def _multiply(x: Activations, matrix: ExpertMatrix, expert: int) -> Tensor:
    """x [P, K] times the transpose of one expert's matrix -> [P, N] float32."""
    if isinstance(matrix, Int4Matrix | Int8Matrix):
        return _scaled(_integer_sums(x, _integers(matrix, expert)), x, matrix.scale[expert])
    sums = ordered_linear(x.values.to(torch.float32), matrix.values[expert].to(torch.float32))
    return _scaled(sums, x, matrix.scale[expert]) if isinstance(matrix, Fp8Matrix) else sums


def _integer_sums(x: Activations, values: Tensor) -> Tensor:
    """x int8 [T, K] times the transpose of values int8 [N, K] -> the sums [T, N], rounded once to float32."""
    # float64 holds every sum of INT8 products exactly, so its matrix product is an integer one.
    return (x.values.to(torch.float64) @ values.to(torch.float64).T).to(torch.float32)


def _scaled(sums: Tensor, x: Activations, weight_scale: Tensor) -> Tensor:
    assert x.scale is not None
    return sums * x.scale[:, None] * weight_scale[None, :]


def _integers(matrix: Int4Matrix | Int8Matrix, expert: int) -> Tensor:
    """One expert's matrix as integers [N, K] int8, without its row scales."""
    if isinstance(matrix, Int8Matrix):
        return matrix.values[expert]
    return _join(matrix.nibbles[expert], matrix.multipliers[expert])


def _join(nibbles: Tensor, multipliers: Tensor) -> Tensor:
    """nibbles [N, K/2], multipliers [N, K/32], both uint8 -> [N, K] int8."""
    grouped = nibbles.view(*multipliers.shape, 16)
    values = torch.cat([grouped & 0xF, grouped >> 4], dim=-1).to(torch.int16) - 8
    return (values * multipliers[..., None]).flatten(1).to(torch.int8)


def _take(x: Activations, rows: Tensor) -> Activations:
    return Activations(x.format, x.values[rows], None if x.scale is None else x.scale[rows])


def _nan_last(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), -torch.inf, x)
