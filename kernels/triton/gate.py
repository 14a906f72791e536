"""`noaux_tc`: the choice of experts from their scores, one token a program."""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocol import GateConfig
from .arithmetic import ordered_exp


@triton.jit
def _largest(values):
    return tl.max(tl.max(values, 1), 0)


@triton.jit
def choose_experts(
    parts, bias, ids, weights, tokens, experts, group_size, factor,
    CHUNKS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr,
    TOP_K: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """parts [CHUNKS, T, E] float32, whose sums in order are the logits. GROUPS, SIZE: powers of 2 that hold the groups
    and a group's experts."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, SIZE)[None, :]
    expert = group * group_size + member
    real = (group < N_GROUP) & (member < group_size)
    preference = tl.load(bias + expert, mask=real, other=0.0)
    logit = tl.zeros((GROUPS, SIZE), tl.float32)
    for chunk in tl.static_range(CHUNKS):  # unrolled, so that all of them are on their way at once
        logit += tl.load(parts + (chunk * tokens + token) * experts + expert, mask=real, other=0.0)
    score = tl.div_rn(tl.full((GROUPS, SIZE), 1.0, tl.float32), ordered_exp(-logit) + 1.0)
    choice = score + preference
    choice = tl.where(choice != choice, float("-inf"), choice)
    choice = tl.where(real, choice, float("-inf"))
    if N_GROUP > 1:
        best = tl.max(choice, 1, keep_dims=True)
        first = tl.min(tl.where((choice == best) & real, member, SIZE), 1, keep_dims=True)
        second = tl.max(tl.where(member == first, float("-inf"), choice), 1, keep_dims=True)
        rank = best + second
        rank = tl.where(rank != rank, float("-inf"), rank)
        unchosen = group < N_GROUP
        opened = group < 0
        for _ in tl.static_range(TOPK_GROUP):
            highest = tl.max(tl.where(unchosen, rank, float("-inf")), 0, keep_dims=True)
            best_group = tl.min(tl.where(unchosen & (rank == highest), group, GROUPS), 0, keep_dims=True)
            opened = opened | (group == best_group)
            unchosen = unchosen & (group != best_group)
        choice = tl.where(opened, choice, float("-inf"))
    free = real
    slot = tl.arange(0, triton.next_power_of_2(TOP_K))
    chosen = tl.zeros_like(slot)
    weight = tl.zeros(slot.shape, tl.float32)
    total = 0.0
    for k in range(TOP_K):
        top = _largest(tl.where(free, choice, float("-inf")))
        number = tl.min(tl.min(tl.where(free & (choice == top), expert, 2147483647), 1), 0)
        at = expert == number
        value = tl.sum(tl.sum(tl.where(at & real, score, 0.0), 1), 0)
        total += value
        chosen = tl.where(slot == k, number, chosen)
        weight = tl.where(slot == k, value, weight)
        free = free & (expert != number)
    if NORM:
        weight = tl.div_rn(weight, total + 1e-20 + tl.zeros_like(weight))
    inside = slot < TOP_K
    tl.store(ids + token * TOP_K + slot, chosen, mask=inside)
    tl.store(weights + token * TOP_K + slot, weight * factor, mask=inside)


def choose(parts: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
    """parts [chunks, T, E] float32 of `linear.float_parts` -> ids [T, K] int32 and weights [T, K] float32, as
    `Kernels.gate`."""
    chunks, tokens, experts = parts.shape
    ids = torch.empty((tokens, config.top_k), dtype=torch.int32, device=parts.device)
    weights = torch.empty((tokens, config.top_k), dtype=torch.float32, device=parts.device)
    if tokens:
        size = experts // config.n_group
        choose_experts[(tokens,)](
            parts, bias, ids, weights, tokens, experts, size, config.routed_scaling_factor,
            chunks, triton.next_power_of_2(config.n_group), triton.next_power_of_2(size),
            config.n_group, config.topk_group, config.top_k, config.norm_topk_prob,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return ids, weights


__all__ = ["choose"]
