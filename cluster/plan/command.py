"""What `flyray plan` does with its options."""

from __future__ import annotations

from collections.abc import Sequence

from ...actors.model.config import ModelConfig
from ...actors.model.expert_matrix import MATRIX_KINDS
from ..bench.model import model_label
from ..synthesize import Synthesis, model_file
from .gpu import PlanError, find_gpu
from .plan import Plan, make_plan
from .workload import Workload


def plan_model(
    model: str,
    gpu: str,
    counts: Sequence[int],
    format: str,
    int8_weights: tuple[str, ...],
    int4_weights: tuple[str, ...],
    context: int,
    prefill: int,
    batches: Sequence[int],
) -> Plan:
    """model: a checkpoint's folder, a config.json, or a shipped shape. format: of the routed experts in memory. Raises
    PlanError, SynthesizeError or ValueError, naming what is wrong."""
    config = ModelConfig.from_dict(Synthesis(model_file(model)).config())
    if format not in MATRIX_KINDS:
        raise PlanError(f"format: {format!r} is none of {', '.join(MATRIX_KINDS)}")
    if context > config.max_position_embeddings or prefill > config.max_position_embeddings:
        raise PlanError(
            f"context: {context} and prefill: {prefill} tokens; the model's max_position_embeddings are "
            f"{config.max_position_embeddings}"
        )
    work = Workload(config, format, int8_weights, int4_weights, context, prefill)
    return make_plan(model_label(model), work, find_gpu(gpu), counts, batches)
