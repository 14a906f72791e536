"""The precision plan: for every kind of weight its format on disk and in memory, what it multiplies, and the kernel.

Nothing falls back in silence: what does not fit is refused here, by the tensor's name, before a byte is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from ..kernels.composed import ComposedKernels, kernel_name
from ..kernels.formats import FORMATS, GROUP_SIZE
from ..kernels.protocol import ActivationFormat, Int4Weight, Int8Weight, Kernels
from .checkpoint import Checkpoint
from .expert_format import ACTIVATIONS
from .linear_kinds import LINEAR_KINDS, check_linear_kinds
from .model.config import ModelConfig
from .model.expert_matrix import MATRIX_KINDS, memory_formats
from .model.kv_pages import KvPages
from .model.tensors import TensorSpec, check_tensors, shard_tensors
from .quantization_config import MIXED

_INT8_ROWS = "INT8 per row"
_INT4_GROUPS = "INT4 g32, u4 multipliers"
_DISK = {
    "bf16": "bf16",
    "w4a16": "INT4 g32, bf16 scales",
    "w4a8": _INT4_GROUPS,
    "w8a8": _INT8_ROWS,
    "w8a8-fp8": "FP8 e4m3 per row",
    "w4a8-channel": "INT4 per row",
}
_MEMORY = _DISK | {"w4a16": "bf16, dequantized", "w4a8-channel": "INT8 per row, from INT4"}
_KV_NAMES = {
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.int8: "INT8, rope key bf16",
    torch.float8_e4m3fn: "FP8, rope key bf16",
}
_SHORT = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}


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
    """disk and memory: the routed experts' formats, of `formats.FORMATS`, or "mixed". sources: which source of the
    backend runs what, and why others do not; none of a backend that is one."""

    disk: str
    memory: str
    rows: tuple[PrecisionRow, ...]
    sources: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """The plan as an aligned table, one line a row under a line of headings, and a line for each of `sources`."""
        table = [tuple(field.name for field in fields(PrecisionRow)), *(astuple(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
        return (*(row.rstrip() for row in rows), *self.sources)


def memory_format(disk: str, precision: str) -> str:
    """The routed experts' in-memory format for `precision`: "auto" (as on disk) or one of `formats.FORMATS`.

    disk: a format, or "mixed", where "auto" alone is right and each expert stays as on disk."""
    if precision == "auto":
        return disk
    if precision not in FORMATS:
        raise PrecisionError(f"precision {precision!r} is unknown; 'auto' or one of {', '.join(FORMATS)} is right")
    if disk == MIXED:
        raise PrecisionError(f"precision {precision!r} cannot be loaded from a mixed checkpoint, only 'auto' can")
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


def precision_plan(
    config: ModelConfig,
    checkpoint: Checkpoint,
    precision: str,
    kernels: Kernels,
    int8_weights: Collection[str] = (),
    int4_weights: Collection[str] = (),
) -> PrecisionPlan:
    """Checks all tensors of the model by their headers and says how each kind is run. int8_weights, int4_weights: as in
    `load_shard`.

    Raises PrecisionError for a precision, or INT4, that does not go with the checkpoint, CheckpointError naming the
    tensor for one that is missing or has another shape or dtype.
    """
    check_linear_kinds(int8_weights, int4_weights)
    rounded = {LINEAR_KINDS[word]: _INT8_ROWS for word in int8_weights}
    rounded |= {LINEAR_KINDS[word]: _INT4_GROUPS for word in int4_weights}
    formats = checkpoint.formats
    memory = memory_format(formats.experts, precision)
    every = range(config.n_routed_experts)
    dtypes = _disk_dtypes(checkpoint, shard_tensors(config, formats, every))
    check_int4_weights(config, checkpoint, int4_weights)
    total = len(every) * len(config.moe_layers)
    if formats.experts == MIXED:
        counts = Counter(formats.matrix(layer, expert) for layer in config.moe_layers for expert in every)
        kinds = [(disk, disk, f", {counts[disk]} of {total}") for disk in FORMATS if counts[disk]]
    else:
        kinds = [(formats.experts, memory, "")]
    sources = kernels.plan.lines() if isinstance(kernels, ComposedKernels) else ()
    return PrecisionPlan(formats.experts, memory, tuple(_rows(config, kinds, dtypes, kernels, rounded)), sources)


def check_int4_weights(config: ModelConfig, checkpoint: Checkpoint, int4_weights: Collection[str]) -> None:
    """Raises PrecisionError naming the first linear that cannot become INT4: its columns are not whole groups, or it is
    in INT8 on disk."""
    rows = {LINEAR_KINDS[word]: word for word in int4_weights}
    for spec in shard_tensors(config, checkpoint.formats, range(0)):
        if spec.kind not in rows or len(spec.shapes[0]) != 2 or spec.module.endswith("kv_b_proj"):
            continue
        if spec.module in checkpoint.formats.int8_linears:
            raise PrecisionError(
                f"int4_weights: {spec.module} is in INT8 on disk, and INT4 is made of bfloat16 alone; "
                f"leave {rows[spec.kind]!r} out, or start from an unquantized checkpoint"
            )
        if spec.shapes[0][1] % GROUP_SIZE:
            raise PrecisionError(
                f"int4_weights: {spec.module} has {spec.shapes[0][1]} columns, not a multiple of {GROUP_SIZE}; "
                f"leave {rows[spec.kind]!r} out"
            )


def _disk_dtypes(checkpoint: Checkpoint, specs: Iterator[TensorSpec]) -> dict[str, str]:
    """The dtypes found for each kind, such as "bf16" or "bf16, INT8 per row"."""
    found: dict[str, set[str]] = {}
    for spec in specs:
        check_tensors(checkpoint, [spec])
        if spec.module in checkpoint.formats.int8_linears:
            found.setdefault(spec.kind, set()).add(_INT8_ROWS)
        elif checkpoint.has(spec.name):
            found.setdefault(spec.kind, set()).add(_short(checkpoint.entry(spec.name).dtype))
    return {kind: ", ".join(sorted(names)) for kind, names in found.items()}


def _rows(
    config: ModelConfig,
    experts: Sequence[tuple[str, str, str]],
    dtypes: dict[str, str],
    kernels: Kernels,
    rounded: Mapping[str, str],
) -> Iterator[PrecisionRow]:
    """experts: disk format, memory format and how many, for each that there is. rounded: what kinds become."""
    activation = _short(kernels.activation_dtype)

    def plain(kind: str, *operations: str, memory: str = "") -> PrecisionRow:
        disk, multiplied = dtypes[kind], activation
        kept = _kept(kind, disk, rounded)
        weights = _weight_kind(kept)
        if weights is not Tensor:
            # Attention's split kv_b_proj, and what else is in floats, multiplies activations as they are.
            integers = kept in (_INT8_ROWS, _INT4_GROUPS)
            multiplied = "INT8 per token" if integers else f"{activation}, INT8 per token"
            operations = ("mlp",) if "silu_mul" in operations else operations
        return PrecisionRow(kind, disk, memory or kept, multiplied, _run(kernels, operations, weights))

    yield PrecisionRow("embedding", dtypes["embedding"], dtypes["embedding"], "-", _run(kernels, ["take_rows"]))
    attention = f"{_kept('attention', dtypes['attention'], rounded)}, kv_b split"
    yield plain("attention", "linear", "absorb", "mla_attention", "head_linear", memory=attention)
    yield plain("norms", "rms_norm")
    if config.first_k_dense_replace:
        yield plain("dense MLP", "linear", "silu_mul")
    yield plain("gate", "gate")
    yield plain("gate bias", "gate", memory="f32")
    yield plain("shared experts", "linear", "silu_mul")
    yield from _expert_rows(experts, activation, kernels)
    yield plain("lm_head", "linear")
    entries = f"{_KV_NAMES[kernels.kv_dtype]}, {KvPages.page_bytes(config, 1, kernels):,} B a token"
    operations = _run(kernels, ["write_kv", "mla_attention"])
    yield PrecisionRow("KV cache", "-", entries, _short(kernels.query_dtype), operations)


def _run(kernels: Kernels, operations: Sequence[str], weights: type | None = None) -> str:
    """Which kernels run these operations, such as "cpu.linear, .rope". weights: of the kind that they multiply."""
    names: list[str] = []
    last = ""
    for operation in operations:
        kind = weights if operation in ("linear", "mlp", "experts") else None
        source, _, name = kernel_name(kernels, operation, kind).partition(".")
        names.append(f".{name}" if source == last else f"{source}.{name}")
        last = source
    return ", ".join(names)


def _weight_kind(kept: str) -> type:
    """What a linear in memory is; an integer where some of a kind are."""
    return Int4Weight if _INT4_GROUPS in kept else Int8Weight if _INT8_ROWS in kept else Tensor


def _kept(kind: str, disk: str, rounded: Mapping[str, str]) -> str:
    """The formats in memory of a kind that has those on disk."""
    if kind not in rounded:
        return disk
    return ", ".join(sorted({*disk.split(", "), rounded[kind]})) if kind == "attention" else rounded[kind]


def _expert_rows(experts: Sequence[tuple[str, str, str]], activation: str, kernels: Kernels) -> Iterator[PrecisionRow]:
    names = {ActivationFormat.INT8: "INT8", ActivationFormat.FP8: "FP8 e4m3"}
    incoming: dict[str, None] = {}
    for disk, memory, count in experts:
        name = names.get(ACTIVATIONS[memory])
        one, two = (f"{name} per token", f"{name} per token and expert") if name else (activation, activation)
        incoming[one] = None
        run = _run(kernels, ["experts"], MATRIX_KINDS[memory])
        yield PrecisionRow(f"routed experts gate/up{count}", _DISK[disk], _MEMORY[memory], one, run)
        yield PrecisionRow(f"routed experts down{count}", _DISK[disk], _MEMORY[memory], two, run)
    yield PrecisionRow("activations of experts", "-", "-", ", ".join(incoming), _run(kernels, ["quantize"]))


def _short(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))
