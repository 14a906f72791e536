"""Builds stage programs: in which order an engine's actors do attention, experts and what lies between.

A program depends on the number of layers and micro-batches alone, not on the number of actors or on batch sizes, so it
is built once at start.
"""

from __future__ import annotations

from typing import Literal

from .program_check import check
from .stage_program import (
    ATTENTIONS,
    Attention,
    LayerPlan,
    Layers,
    ProgramError,
    Stage,
    StageKind,
    StageProgram,
    make_stage,
)

__all__ = [
    "Attention",
    "LayerPlan",
    "Placement",
    "ProgramError",
    "Stage",
    "StageKind",
    "StageProgram",
    "check",
    "sequence",
]

Placement = Literal["colocated", "disaggregated"]

COLOCATED: Placement = "colocated"
DISAGGREGATED: Placement = "disaggregated"
DATA_PARALLEL: Attention = "data_parallel"
TENSOR_PARALLEL: Attention = "tensor_parallel"
ATTENTION, EXPERTS = "attention", "experts"
"""The roles of a disaggregated program."""


def sequence(
    model: Layers, placement: Placement, micro_batches: int, attention: Attention = DATA_PARALLEL
) -> StageProgram:
    """The checked program of a model. Placement "colocated": every actor has attention and experts, one role;
    "disaggregated": some have attention and all beside the routed experts, others those. An engine runs the first.
    Tensor-parallel attention is colocated.

    With several micro-batches one's tokens travel while another's attention or experts are computed. Raises
    `ProgramError` for sizes, a placement or an attention that there is not.
    """
    if attention not in ATTENTIONS:
        raise ProgramError(f"attention: {attention!r} is none of {', '.join(ATTENTIONS)}")
    if placement not in (COLOCATED, DISAGGREGATED):
        raise ProgramError(f"placement: {placement!r} is not known, there are {COLOCATED!r} and {DISAGGREGATED!r}")
    if micro_batches < 1:
        raise ProgramError(f"micro_batches: {micro_batches} is below 1")
    layers = LayerPlan(model.num_hidden_layers, model.first_k_dense_replace)
    if attention == TENSOR_PARALLEL and placement != COLOCATED:
        raise ProgramError(f"attention: {attention!r} is {COLOCATED}, not {placement}")
    stages = (_tensor_parallel if attention == TENSOR_PARALLEL else _colocated)(layers, micro_batches)
    roles = {COLOCATED: stages} if placement == COLOCATED else _roles(stages)
    name = attention if attention == TENSOR_PARALLEL else placement
    program = StageProgram(f"{name}-{micro_batches}", layers, micro_batches, roles, attention)
    check(program)
    return program


def _colocated(layers: LayerPlan, micro_batches: int) -> tuple[Stage, ...]:
    """Layer by layer; in each, all micro-batches up to their dispatch, then the experts for each.

    A micro-batch's results are taken in at the last moment, before its next attention, so that they travel while the
    experts of the micro-batches after it are computed.
    """
    numbers = range(micro_batches)
    order = [make_stage("embed", -1, number) for number in numbers]
    for layer in range(layers.num_hidden_layers):
        dense = layer < layers.first_k_dense_replace
        for number in numbers:
            if layer > layers.first_k_dense_replace:
                order.append(make_stage("combine", layer - 1, number))
            order.append(make_stage("attention", layer, number))
            kinds: tuple[StageKind, ...] = ("dense",) if dense else ("gate", "dispatch", "shared")
            order.extend(make_stage(kind, layer, number) for kind in kinds)
        if not dense:
            order.extend(make_stage("experts", layer, number) for number in numbers)
    for number in numbers:
        if layers.first_k_dense_replace < layers.num_hidden_layers:
            order.append(make_stage("combine", layers.num_hidden_layers - 1, number))
        order.append(make_stage("head", -1, number))
    order.extend(make_stage("sample", -1, number) for number in numbers)
    return tuple(order)


def _tensor_parallel(layers: LayerPlan, micro_batches: int) -> tuple[Stage, ...]:
    """As `_colocated`; in each layer the heads of all micro-batches first, then what comes behind them for each.

    The shared expert is computed while the routed experts' outputs travel.
    """
    numbers, first_moe, count = range(micro_batches), layers.first_k_dense_replace, layers.num_hidden_layers
    order = [make_stage("embed", -1, number) for number in numbers]
    for layer in range(count):
        for number in numbers:
            if layer > first_moe:
                order.append(make_stage("combine", layer - 1, number))
            order.append(make_stage("own_heads", layer, number))
        kinds: tuple[StageKind, ...] = ("dense",) if layer < first_moe else ("gate", "own_experts", "shared")
        for number in numbers:
            order += [make_stage(kind, layer, number) for kind in ("output", *kinds)]
    for number in numbers:
        if first_moe < count:
            order.append(make_stage("combine", count - 1, number))
        order.append(make_stage("own_logits", -1, number))
    for number in numbers:
        order += [make_stage("logits", -1, number), make_stage("sample", -1, number)]
    return tuple(order)


def _roles(stages: tuple[Stage, ...]) -> dict[str, tuple[Stage, ...]]:
    """The stages of all actors as those of two roles."""
    return {
        ATTENTION: tuple(stage for stage in stages if stage.kind != "experts"),
        EXPERTS: tuple(stage for stage in stages if stage.kind == "experts"),
    }
