"""The model as it is trained: DeepSeek-V3's blocks over flat tokens, experts as one grouped product.

Weights are kept in f32 and rounded to bf16 where they are used, the routed experts through INT4 once ``rounding``
is on, so that the exported checkpoint computes exactly what training computed.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .architecture import GROUP, Architecture, plain_frequencies, yarn_frequencies, yarn_softmax_gain

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
EXPERTS = ("expert_gate", "expert_up", "expert_down")
INT4_LARGEST = 7


def rounded(weight: Tensor) -> Tensor:
    """A weight rounded to bf16, in bf16 on a GPU and in f32 elsewhere."""
    weight = weight.to(torch.bfloat16)
    return weight if weight.is_cuda else weight.float()


def group_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., K]`` to groups ``[..., K / 32, 32] f32`` and their bf16 scales ``[..., K / 32, 1]``."""
    groups = weight.reshape(*weight.shape[:-1], -1, GROUP)
    return groups, (groups.abs().amax(-1, keepdim=True) / INT4_LARGEST).to(torch.bfloat16)


class Context(Protocol):
    """What the functions below use of autograd's context, which torch leaves untyped."""

    k: int  # slots a token, kept by Dispatch alone

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    def save_for_backward(self, *tensors: Tensor) -> None: ...


# torch's stub gives backward as (ctx, *grad_outputs); its documentation has one parameter for each output, as here


class Int4(torch.autograd.Function):
    """Rounds to INT4 in groups of 32; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, is_on: bool) -> Tensor:
        if not is_on:
            return weight.to(torch.bfloat16)
        groups, scales = group_scales(weight)
        scales = scales.float().clamp_min(1e-8)
        return ((groups / scales).round().clamp(-8, 7) * scales).to(torch.bfloat16).view_as(weight)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.float(), None


class Dispatch(torch.autograd.Function):
    """Copies tokens ``[n, d]`` to their slots ``[n * k, d]``; the backward pass gathers instead of scattering."""

    @staticmethod
    def forward(ctx: Context, tokens: Tensor, source: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return tokens[source]

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Context, gradient: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        summed = gradient[inverse].view(-1, ctx.k, gradient.shape[-1]).float().sum(1)
        return summed.to(gradient.dtype), None, None, None


class Combine(torch.autograd.Function):
    """Brings slots ``[n * k, d]`` back into the tokens' order."""

    @staticmethod
    def forward(ctx: Context, slots: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return slots[inverse]

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (order,) = ctx.saved_tensors
        return gradient[order], None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm, computed in f32."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + epsilon) * rounded(weight).float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs ``[n, h, rope]``; first halves come first in the result, as in DeepSeek's code."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``x [slots, in]`` sorted by expert times ``weights [e, out, in]``; ``ends [e] i32`` end each expert's slots."""
    if x.is_cuda:
        # public as F.grouped_mm, which passes on to this
        return torch._grouped_mm(x, weights.transpose(-2, -1), offs=ends)  # pyright: ignore[reportPrivateImportUsage]
    starts = [0, *ends.tolist()]
    return torch.cat([x[starts[e] : starts[e + 1]] @ weights[e].to(x.dtype).t() for e in range(weights.shape[0])])


def matrix(*shape: int, gain: float = 0.5) -> nn.Parameter:
    """A random matrix; its entries shrink with the inputs summed."""
    return nn.Parameter(torch.randn(*shape) * (gain / math.sqrt(shape[-1])))


def ones(size: int) -> nn.Parameter:
    """A norm's weight."""
    return nn.Parameter(torch.ones(size))


class Block(nn.Module):
    """One layer: latent attention, then a dense or a routed feed-forward part."""

    bias: Tensor  # [e] added to the gate's scores when experts are chosen; a dense layer has none

    def __init__(self, sizes: Architecture, index: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.is_dense = index == 0
        hidden, heads = sizes.hidden_size, sizes.num_attention_heads
        out = 0.5 / math.sqrt(2 * sizes.num_hidden_layers)
        self.input_norm, self.post_norm = ones(hidden), ones(hidden)
        self.q_a_norm, self.kv_a_norm = ones(sizes.q_lora_rank), ones(sizes.kv_lora_rank)
        self.q_a = matrix(sizes.q_lora_rank, hidden)
        self.q_b = matrix(heads * sizes.query_head_dim, sizes.q_lora_rank)
        self.kv_a = matrix(sizes.kv_lora_rank + sizes.qk_rope_head_dim, hidden)
        self.kv_b = matrix(heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), sizes.kv_lora_rank)
        self.o = matrix(hidden, heads * sizes.v_head_dim, gain=out)
        if self.is_dense:
            self.dense_gate, self.dense_up = (
                matrix(sizes.intermediate_size, hidden),
                matrix(sizes.intermediate_size, hidden),
            )
            self.dense_down = matrix(hidden, sizes.intermediate_size, gain=out)
            return
        inner, experts = sizes.moe_intermediate_size, sizes.n_routed_experts
        self.shared_gate, self.shared_up = matrix(inner, hidden), matrix(inner, hidden)
        self.shared_down = matrix(hidden, inner, gain=out)
        self.gate = matrix(experts, hidden, gain=0.02 * math.sqrt(hidden))
        self.expert_gate, self.expert_up = matrix(experts, inner, hidden), matrix(experts, inner, hidden)
        self.expert_down = matrix(experts, hidden, inner, gain=out)
        self.register_buffer("bias", torch.zeros(experts))

    def projections(self, x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [n, hidden]`` to q and k ``[n, h, nope + rope]`` and v ``[n, h, v]``; ``gain`` scales the queries."""
        sizes, count, heads = self.sizes, x.shape[0], self.sizes.num_attention_heads
        nope, rank = sizes.qk_nope_head_dim, sizes.kv_lora_rank
        h = rms_norm(x, self.input_norm, sizes.rms_norm_eps)
        low = rms_norm(F.linear(h, rounded(self.q_a)), self.q_a_norm, sizes.lora_norm_eps)
        q = F.linear(low, rounded(self.q_b)).view(count, heads, sizes.query_head_dim)
        latent = F.linear(h, rounded(self.kv_a))
        low = rms_norm(latent[:, :rank], self.kv_a_norm, sizes.lora_norm_eps)
        kv = F.linear(low, rounded(self.kv_b)).view(count, heads, nope + sizes.v_head_dim)
        turned = rotate(latent[:, None, rank:], cos, sin).expand(count, heads, sizes.qk_rope_head_dim)
        q = torch.cat([q[..., :nope], rotate(q[..., nope:], cos, sin)], -1)
        k = torch.cat([kv[..., :nope], turned], -1)
        return (q.float() * gain).to(q.dtype), k, kv[..., nope:]

    def attended(self, x: Tensor, heads: Tensor) -> Tensor:
        """Adds the attention's output ``heads [n, h * v]``."""
        return x + F.linear(heads, rounded(self.o))

    def experts(self, rounding: bool) -> tuple[Tensor, Tensor]:
        """The routed experts' gate and up ``[e, 2 * inner, hidden]`` and down ``[e, hidden, inner]``, as used."""
        up = torch.cat([Int4.apply(self.expert_gate, rounding), Int4.apply(self.expert_up, rounding)], 1)
        down = Int4.apply(self.expert_down, rounding)
        return (up, down) if up.is_cuda else (up.float(), down.float())

    def dense(self, x: Tensor) -> Tensor:
        """The dense feed-forward part."""
        h = rms_norm(x, self.post_norm, self.sizes.rms_norm_eps)
        inner = F.silu(F.linear(h, rounded(self.dense_gate))) * F.linear(h, rounded(self.dense_up))
        return x + F.linear(inner, rounded(self.dense_down))

    def routed(self, x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The routed and the shared experts; also the load ``[e]`` of each expert."""
        sizes, count = self.sizes, x.shape[0]
        k, experts, inner = sizes.num_experts_per_tok, sizes.n_routed_experts, sizes.moe_intermediate_size
        h = rms_norm(x, self.post_norm, sizes.rms_norm_eps)
        scores = F.linear(h.float(), rounded(self.gate).float()).sigmoid()
        chosen = torch.topk(scores.detach() + self.bias, k, dim=-1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * sizes.routed_scaling_factor
        flat = chosen.reshape(-1)
        order = torch.sort(flat.to(torch.uint8), stable=True).indices
        load = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(count * k, device=flat.device)
        ends = load.cumsum(0).to(torch.int32)
        both = grouped(Dispatch.apply(h, order // k, inverse, k), up, ends)
        slots = grouped(F.silu(both[:, :inner]) * both[:, inner:], down, ends)
        mixed = (Combine.apply(slots, order, inverse).view(count, k, -1) * weights.to(h.dtype)[..., None]).sum(1)
        shared = F.silu(F.linear(h, rounded(self.shared_gate))) * F.linear(h, rounded(self.shared_up))
        return x + mixed + F.linear(shared, rounded(self.shared_down)), load


class Blocks(nn.ModuleList):
    """The layers in their order."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(blocks)

    def __iter__(self) -> Iterator[Block]:
        return cast(Iterator[Block], super().__iter__())  # the constructor takes nothing else


class Model(nn.Module):
    """The whole model over flat tokens; the parts that are compiled stand as attributes."""

    plain_frequencies: Tensor
    yarn_frequencies: Tensor

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.randn(sizes.vocab_size, sizes.hidden_size) * 0.1)
        self.head = nn.Parameter(torch.randn(sizes.vocab_size, sizes.hidden_size) * 0.02)
        self.norm = ones(sizes.hidden_size)
        self.blocks = Blocks(Block(sizes, index) for index in range(sizes.num_hidden_layers))
        self.register_buffer("plain_frequencies", plain_frequencies(sizes))
        self.register_buffer("yarn_frequencies", yarn_frequencies(sizes))
        self.rounding = False
        self.yarn = False
        self.compiled: dict[str, Callable] = {}

    def compile_parts(self) -> None:
        """Compiles the blocks' parts and the loss; used while training."""
        torch._dynamo.config.cache_size_limit = 64
        for part in (Block.projections, Block.attended, Block.dense, Block.routed, Model.losses):
            self.compiled[part.__name__] = torch.compile(part, dynamic=False)

    def part(self, function: Callable) -> Callable:
        """The compiled form of a part while training, if there is one."""
        return self.compiled.get(function.__name__, function) if self.training else function

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines and sines ``[n, 1, rope / 2]`` and the gain of the queries."""
        frequencies = self.yarn_frequencies if self.yarn else self.plain_frequencies
        angles = positions.float()[:, None] * frequencies
        gain = yarn_softmax_gain(self.sizes) if self.yarn else 1.0
        return angles.cos()[:, None], angles.sin()[:, None], torch.full((), gain, device=positions.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids ``[n]`` to ``[n, hidden]``."""
        return F.embedding(tokens, rounded(self.embedding))

    def feed_forward(self, block: Block, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A block's second half, and its experts' load if it has any."""
        if block.is_dense:
            return self.part(Block.dense)(block, x), None
        return self.part(Block.routed)(block, x, *block.experts(self.rounding))

    def losses(self, x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum of the losses, and every token's loss ``[n]``."""
        each = F.cross_entropy(self.logits(x), targets, reduction="none")
        return (each * weights).sum(), each

    def logits(self, x: Tensor) -> Tensor:
        """``[n, hidden]`` to ``[n, vocab] f32``."""
        return F.linear(rms_norm(x, self.norm, self.sizes.rms_norm_eps), rounded(self.head)).float()

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Flat ``[n]`` inputs to the loss' sum, each token's loss ``[n]`` and the experts' loads ``[layers, e]``."""
        x, loads = self.embed(tokens), []
        cos, sin, gain = self.rotation(positions)
        for block in self.blocks:
            heads = attention(*self.part(Block.projections)(block, x, cos, sin, gain))
            x = self.part(Block.attended)(block, x, heads)
            x, load = self.feed_forward(block, x)
            loads += [] if load is None else [load]
        return (*self.part(Model.losses)(self, x, targets, weights), torch.stack(loads))
