"""The precision plan: for every kind of weight its format on disk and in memory, what it multiplies, and the kernel.

Nothing falls back in silence: what does not fit is refused here, by the tensor's name, before a byte is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields

import torch

from ..kernels.formats import FORMATS
from ..kernels.protocol import Kernels
from ..kernels.select import kernel_name
from .checkpoint import Checkpoint
from .model.config import ModelConfig
from .model.expert_matrix import memory_formats
from .model.tensors import TensorSpec, check_tensors, shard_tensors

_DISK = {
    "bf16": "bf16",
    "w4a16": "INT4 g32, bf16 scales",
    "w4a8": "INT4 g32, u4 multipliers",
    "w8a8": "INT8 per row",
    "w8a8-fp8": "FP8 e4m3 per row",
    "w4a8-channel": "INT4 per row",
}
_MEMORY = _DISK | {"w4a16": "bf16, dequantized", "w4a8-channel": "INT8 per row, from INT4"}
_SHORT = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}
_INT8 = ("w4a8", "w8a8", "w4a8-channel")


class PrecisionError(ValueError):
    """A precision that a checkpoint cannot be run in; the message says what to run instead."""


@dataclass(frozen=True)
class PrecisionRow:
    """One kind of weight (or cache, or activation). "-" where a column does not apply."""

    kind: str
    disk: str
    memory: str
    activations: str
    kernel: str


@dataclass(frozen=True)
class PrecisionPlan:
    """disk and memory: the routed experts' formats, of `formats.FORMATS`."""

    disk: str
    memory: str
    rows: tuple[PrecisionRow, ...]

    def lines(self) -> tuple[str, ...]:
        """The plan as an aligned table, one line a row under a line of headings."""
        table = [tuple(field.name for field in fields(PrecisionRow)), *(astuple(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return tuple(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        )


def memory_format(disk: str, precision: str) -> str:
    """The routed experts' in-memory format for `precision`: "auto" (as on disk) or one of `formats.FORMATS`."""
    if precision == "auto":
        return disk
    if precision not in FORMATS:
        raise PrecisionError(f"precision {precision!r} is unknown; 'auto' or one of {', '.join(FORMATS)} is right")
    possible = memory_formats(disk)
    if precision in possible:
        return precision
    # Only the unquantized weights and the native INT4 groups are sources to quantize from.
    remedy = (
        f"make such a checkpoint with: flyray quantize SRC DST --format {precision}"
        if disk in ("bf16", "w4a16") and precision not in ("bf16", "w4a16")
        else f"start from a checkpoint in {precision}, or from the native one"
    )
    raise PrecisionError(
        f"precision {precision!r} cannot be loaded from a {disk} checkpoint, only {', '.join(possible)} can; {remedy}"
    )


def precision_plan(config: ModelConfig, checkpoint: Checkpoint, precision: str, kernels: Kernels) -> PrecisionPlan:
    """Checks all tensors of the model by their headers and says how each kind is run.

    Raises PrecisionError for a precision that does not go with the checkpoint, CheckpointError naming the tensor for
    one that is missing or has another shape or dtype.
    """
    disk = checkpoint.expert_format()
    memory = memory_format(disk, precision)
    dtypes = _disk_dtypes(checkpoint, shard_tensors(config, disk, range(config.n_routed_experts)))
    rows = tuple(_rows(config, (disk, memory), dtypes, kernels))
    return PrecisionPlan(disk, memory, rows)


def _disk_dtypes(checkpoint: Checkpoint, specs: Iterator[TensorSpec]) -> dict[str, str]:
    """The dtypes found for each kind, such as "bf16" or "bf16, f32"."""
    found: dict[str, set[str]] = {}
    for spec in specs:
        check_tensors(checkpoint, [spec])
        if checkpoint.has(spec.name):
            found.setdefault(spec.kind, set()).add(_short(checkpoint.entry(spec.name).dtype))
    return {kind: ", ".join(sorted(names)) for kind, names in found.items()}


def _rows(
    config: ModelConfig, formats: tuple[str, str], dtypes: dict[str, str], kernels: Kernels
) -> Iterator[PrecisionRow]:
    activation = _short(kernels.activation_dtype)

    def run(*operations: str) -> str:
        first, *others = operations
        return ", ".join([kernel_name(kernels, first), *(f".{operation}" for operation in others)])

    def plain(kind: str, *operations: str, memory: str = "") -> PrecisionRow:
        return PrecisionRow(kind, dtypes[kind], memory or dtypes[kind], activation, run(*operations))

    yield PrecisionRow("embedding", dtypes["embedding"], dtypes["embedding"], "-", "row lookup")
    attention = f"{dtypes['attention']}, kv_b split"
    yield plain("attention", "linear", "head_linear", "rope", "mla_attention", memory=attention)
    yield plain("norms", "rms_norm")
    if config.first_k_dense_replace:
        yield plain("dense MLP", "linear", "silu_mul")
    yield plain("gate", "gate")
    yield plain("gate bias", "gate", memory="f32")
    yield plain("shared experts", "linear", "silu_mul")
    yield from _expert_rows(formats, activation, run("quantize"), run("experts"))
    yield plain("lm_head", "linear")
    yield PrecisionRow("KV cache", "-", activation, activation, run("write_kv", "mla_attention"))


def _expert_rows(formats: tuple[str, str], activation: str, quantize: str, experts: str) -> Iterator[PrecisionRow]:
    disk, memory = formats
    if memory in _INT8:
        incoming, inner = "INT8 per token", "INT8 per token and expert"
    elif memory == "w8a8-fp8":
        incoming, inner = "FP8 e4m3 per token", "FP8 e4m3 per token and expert"
    else:
        incoming = inner = activation
    yield PrecisionRow("routed experts gate/up", _DISK[disk], _MEMORY[memory], incoming, experts)
    yield PrecisionRow("routed experts down", _DISK[disk], _MEMORY[memory], inner, experts)
    yield PrecisionRow("activations of experts", "-", "-", incoming, quantize)


def _short(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))
