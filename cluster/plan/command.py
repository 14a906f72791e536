"""What `flyray plan` does with its options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...actors.checkpoint import Checkpoint
from ...actors.linear_kinds import LINEAR_KINDS, check_linear_kinds, linear_kind
from ...actors.model.config import ModelConfig
from ...actors.model.expert_matrix import MATRIX_KINDS
from ...actors.quantization_config import MIXED
from ...actors.weight_formats import INT8_LINEAR
from ..bench.model import model_label
from ..synthesize import Synthesis, model_file, read_shape
from .disk import DiskBytes, checkpoint_bytes, native_bytes
from .gpu import PlanError, find_gpu
from .plan import Plan, make_plan
from .workload import PLANNED_KV_DTYPES, Workload

_FORMAT, _CONTEXT, _PREFILL = "w4a8", 8192, 2048


@dataclass(frozen=True)
class PlannedModel:
    """disk_format: of the routed experts in a checkpoint that is here, else "". int8_weights: kinds that are INT8 in
    it."""

    config: ModelConfig
    disk: DiskBytes
    disk_format: str = ""
    int8_weights: tuple[str, ...] = ()


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
    kv_dtype: str = "bf16",
) -> Plan:
    """model: a checkpoint's folder, a config.json, or a shipped shape. format: of the routed experts in memory; "": as
    the checkpoint has them, else w4a8. context, prefill: 0 for 8192 and 2048, or the model's most. Raises PlanError,
    SynthesizeError, CheckpointError or ValueError, naming what is wrong."""
    found = read_model(model)
    work = workload(found, format, int8_weights, int4_weights, context, prefill, kv_dtype)
    return make_plan(model_label(model), found.disk, work, find_gpu(gpu), counts, batches)


def read_model(model: str) -> PlannedModel:
    """Raises SynthesizeError, CheckpointError, or PlanError for a checkpoint that mixes formats in one kind."""
    if Path(model).is_dir() and any(Path(model).glob("*.safetensors")):
        checkpoint = Checkpoint(model)
        config = ModelConfig.from_dict(checkpoint.config)
        disk = checkpoint_bytes(checkpoint, config)
        return PlannedModel(config, disk, checkpoint.expert_format(), _int8_kinds(checkpoint))
    content = read_shape(model_file(model))
    config = ModelConfig.from_dict(Synthesis(model_file(model)).config())
    return PlannedModel(config, native_bytes(content, config))


def workload(
    model: PlannedModel,
    format: str,
    int8_weights: tuple[str, ...],
    int4_weights: tuple[str, ...],
    context: int,
    prefill: int,
    kv_dtype: str,
) -> Workload:
    """Arguments as those of `plan_model`. Raises PlanError."""
    format = format or model.disk_format or _FORMAT
    if format == MIXED:
        raise PlanError("format: the checkpoint's experts are in several; name one to plan with")
    if format not in MATRIX_KINDS:
        raise PlanError(f"format: {format!r} is none of {', '.join(MATRIX_KINDS)}")
    if kv_dtype not in PLANNED_KV_DTYPES:
        raise PlanError(f"kv_dtype: {kv_dtype!r} is none of {', '.join(PLANNED_KV_DTYPES)}")
    most = model.config.max_position_embeddings
    context, prefill = context or min(_CONTEXT, most), prefill or min(_PREFILL, most)
    if context > most or prefill > most:
        raise PlanError(
            f"context: {context} and prefill: {prefill} tokens; the model's max_position_embeddings are {most}"
        )
    try:
        check_linear_kinds(int8_weights, int4_weights)
    except ValueError as error:
        raise PlanError(str(error)) from None
    both = set(model.int8_weights) & set(int4_weights)
    if both:
        raise PlanError(f"int4_weights: {', '.join(sorted(both))}: INT8 in the checkpoint, and loaded as it is")
    int8 = (*int8_weights, *(kind for kind in model.int8_weights if kind not in int8_weights))
    return Workload(model.config, format, int8, int4_weights, context, prefill, kv_dtype)


def _int8_kinds(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Of `LINEAR_KINDS`, those whose linears are INT8 in the checkpoint."""
    int8 = checkpoint.formats.int8_linears
    modules = {name.removesuffix(".weight") for name in checkpoint.names if name.endswith(".weight")}
    found = []
    for kind in LINEAR_KINDS:
        linears = {module for module in modules if INT8_LINEAR.fullmatch(module) and linear_kind(module) == kind}
        if linears & int8 and linears - int8:
            raise PlanError(
                f"{checkpoint.path}: some linears of {kind} are INT8 and some are not, as {min(linears - int8)}: bytes "
                "are planned of kinds that are alike in all layers"
            )
        found += [kind] if linears & int8 else []
    return tuple(found)
