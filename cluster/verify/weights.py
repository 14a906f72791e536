"""Two checkpoints tensor by tensor: what was copied, and how far the quantized weights are from the source's.

Smoothing moves powers of two between tensors without changing what the model computes, so it is undone before weights
are compared: the factors of a layer's input are those between both norms, the factors of an expert's inner activations
those between the rows of both up_proj, if the columns of down_proj have them too.

Memory: an expert's three matrices of both checkpoints as float32, or a piece of another tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...actors.checkpoint import Checkpoint
from ...actors.expert_format import EXPERT_TENSOR, expert_matrices
from ..quantize.matrix import dequantize
from .structure import CHUNK_BYTES, Progress

_NEAR = 1.3
"""A gain within this factor of a power of two is that power."""


@dataclass(frozen=True)
class Distance:
    """A tensor of B against A's. difference and norm: squared Frobenius norms of what differs and of A's.

    worst_row: the row with the largest relative error row_error; there B is row_gain times A, as least squares have it.
    """

    name: str
    kind: str
    difference: float
    norm: float
    worst_row: int
    row_error: float
    row_gain: float

    @property
    def error(self) -> float:
        """Relative Frobenius norm."""
        return _relative(self.difference, self.norm)


@dataclass
class WeightReport:
    """experts, linears: those in a quantized format on either side. identical: names of copied tensors that are the
    same to the bit, smoothed: those that smoothing scaled and nothing else changed, differing: the others.
    missing, extra: tensors that only A or only B has."""

    experts: list[Distance] = field(default_factory=list)
    linears: list[Distance] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    smoothed: list[str] = field(default_factory=list)
    differing: list[Distance] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def compare_weights(a: Checkpoint, b: Checkpoint, progress: Progress) -> WeightReport:
    """Compares every tensor, one expert or tensor at a time. Both must have passed `tensors_check`.

    Raises CheckpointError when a file has changed meanwhile.
    """
    report = WeightReport()
    names, others = _plain_names(a), _plain_names(b)
    report.missing = [name for name in names if name not in others]
    report.extra = [name for name in others if name not in names]
    for name in names:
        if name in others:
            progress(name)
            _compare_plain(a, b, name, report)
    for layer, expert in dict.fromkeys(_experts(a)):
        progress(f"model.layers.{layer}.mlp.experts.{expert}")
        report.experts += compare_expert(a, b, layer, expert)
    return report


def relative_error(distances: list[Distance]) -> float:
    """Relative Frobenius norm of several tensors taken as one."""
    return _relative(sum(each.difference for each in distances), sum(each.norm for each in distances))


def compare_expert(a: Checkpoint, b: Checkpoint, layer: int, expert: int) -> list[Distance]:
    """The distances of an expert's gate_proj, up_proj and down_proj, smoothing undone."""
    at = f"model.layers.{layer}.mlp.experts.{expert}"
    gate, up, down = (f"{at}.{kind}_proj" for kind in ("gate", "up", "down"))
    formats = (a.matrix_format(layer, expert), b.matrix_format(layer, expert))
    factor = input_factor(a, b, layer)
    if factor is None and formats[0] == formats[1] and all(_same_parts(a, b, name) for name in (gate, up, down)):
        return [_equal(a, name, formats[0]) for name in (gate, up, down)]
    ours, theirs = (
        {name: _weights(side, name, form) for name in (gate, up, down)}
        for side, form in zip((a, b), formats, strict=True)
    )
    if factor is not None:
        theirs[gate], theirs[up] = theirs[gate] / factor, theirs[up] / factor
    inner = _inner_factor(ours, theirs, up, down)
    if inner is not None:
        theirs[up], theirs[down] = theirs[up] * inner.unsqueeze(1), theirs[down] / inner
    return [_distance(name, name.rpartition(".")[2], [(ours[name], theirs[name])]) for name in (gate, up, down)]


def input_factor(a: Checkpoint, b: Checkpoint, layer: int) -> Tensor | None:
    """[D] float32: the powers of two that B divides the input of a layer's MLP by, and A does not; None for none, also
    where the norms differ by something else."""
    name = f"model.layers.{layer}.post_attention_layernorm.weight"
    ratio = a.read(name).float() / b.read(name).float()
    ratio = torch.where(ratio.isfinite(), ratio, 1.0)
    mantissa, _ = torch.frexp(ratio)
    if bool((mantissa != 0.5).any()) or bool((ratio == 1).all()):
        return None
    return ratio


def _inner_factor(ours: dict[str, Tensor], theirs: dict[str, Tensor], up: str, down: str) -> Tensor | None:
    """[I] float32: what B divides an expert's inner activations by; 1 where the columns of down_proj do not agree."""
    rows, columns = _gain(ours[up], theirs[up], 1), _gain(ours[down], theirs[down], 0)
    power = torch.where((rows > 0) & rows.isfinite(), rows, 1.0).log2().round().exp2()
    agreed = _near(rows / power) & _near(columns * power)
    factor = torch.where(agreed, 1 / power, 1.0).float()
    return None if bool((factor == 1).all()) else factor


def _near(ratio: Tensor) -> Tensor:
    return (ratio > 1 / _NEAR) & (ratio < _NEAR)


def _gain(ours: Tensor, theirs: Tensor, dimension: int) -> Tensor:
    """By how much rows (dimension 1) or columns (0) are larger, as least squares have it; NaN for zeros. float64."""
    cross = (ours * theirs).sum(dimension, dtype=torch.float64)
    return cross / ours.square().sum(dimension, dtype=torch.float64)


def _compare_plain(a: Checkpoint, b: Checkpoint, name: str, report: WeightReport) -> None:
    scales = [f"{name.removesuffix('.weight')}.weight_scale" for side in (a, b) if _is_int8(side, name)]
    if a.entry(name).shape != b.entry(name).shape:
        shapes = f"{list(a.entry(name).shape)} and {list(b.entry(name).shape)}"
        report.differing.append(Distance(f"{name} {shapes}", "shape", math.inf, 1.0, 0, math.inf, math.nan))
    elif _same_bytes(a, b, [name, *scales]):
        (report.linears.append(_equal_plain(name)) if scales else report.identical.append(name))
    else:
        factor = _plain_factor(a, b, name)
        distance = _distance(name, "linear" if scales else "tensor", _row_pairs(a, b, name, factor))
        if scales:
            report.linears.append(distance)
        elif factor is not None and distance.difference == 0:
            report.smoothed.append(name)
        else:
            report.differing.append(distance)


def _plain_factor(a: Checkpoint, b: Checkpoint, name: str) -> Tensor | None:
    """What B's tensor is multiplied with by smoothing of the layer's input."""
    pieces = name.split(".")
    if pieces[:2] != ["model", "layers"]:
        return None
    layer, place = int(pieces[2]), ".".join(pieces[3:])
    if place == "post_attention_layernorm.weight":
        factor = input_factor(a, b, layer)
        return None if factor is None else 1 / factor
    if place in ("mlp.gate.weight", "mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"):
        return input_factor(a, b, layer)
    return None


def _row_pairs(a: Checkpoint, b: Checkpoint, name: str, factor: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of both tensors as float32 [n, K], B's with smoothing undone."""
    shape = a.entry(name).shape
    rows = shape[0] if len(shape) > 1 else 1
    step = max(1, CHUNK_BYTES // max(1, 4 * math.prod(shape) // rows))
    for first in range(0, rows, step):
        pair = [_plain_rows(side, name, first, min(rows, first + step)) for side in (a, b)]
        yield pair[0], pair[1] if factor is None else pair[1] / factor


def _plain_rows(checkpoint: Checkpoint, name: str, first: int, last: int) -> Tensor:
    if len(checkpoint.entry(name).shape) < 2:
        return checkpoint.read(name).float().reshape(1, -1)
    rows = checkpoint.read_rows(name, first, last).float().flatten(1)
    if _is_int8(checkpoint, name):
        rows *= checkpoint.read_rows(f"{name.removesuffix('.weight')}.weight_scale", first, last).float().unsqueeze(1)
    return rows


def _is_int8(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and checkpoint.has(f"{name.removesuffix('.weight')}.weight_scale")


def _distance(name: str, kind: str, pairs: Iterator[tuple[Tensor, Tensor]] | list[tuple[Tensor, Tensor]]) -> Distance:
    """Over pieces [n, K] float32 of A and B, top to bottom."""
    difference = norm = 0.0
    worst, row_error, row_gain, first = 0, -1.0, 1.0, 0
    for ours, theirs in pairs:
        lost = (ours - theirs).square().sum(1, dtype=torch.float64)
        square = ours.square().sum(1, dtype=torch.float64)
        errors = torch.where(square > 0, (lost / square).sqrt(), torch.where(lost > 0, math.inf, 0.0))
        row = int(errors.nan_to_num(nan=math.inf).argmax())
        error = float(errors[row])
        if not error <= row_error:  # also when it is not a number
            worst, row_error = first + row, error
            row_gain = float(_gain(ours[row : row + 1], theirs[row : row + 1], 1))
        difference, norm, first = difference + float(lost.sum()), norm + float(square.sum()), first + len(ours)
    return Distance(name, kind, difference, norm, worst, row_error, row_gain)


def _equal(checkpoint: Checkpoint, name: str, form: str) -> Distance:
    """The distance of a matrix whose tensors are the same."""
    weights = _weights(checkpoint, name, form)
    norm = float(weights.square().sum(dtype=torch.float64))
    return Distance(name, name.rpartition(".")[2], 0.0, norm, 0, 0.0, 1.0)


def _equal_plain(name: str) -> Distance:
    return Distance(name, "linear", 0.0, 0.0, 0, 0.0, 1.0)


def _weights(checkpoint: Checkpoint, name: str, form: str) -> Tensor:
    parts = {part: checkpoint.read(f"{name}.{part}") for part in _parts(checkpoint, name)}
    return dequantize(form, parts)


def _parts(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    known = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_multiplier", "weight_shape")
    return tuple(part for part in known if checkpoint.has(f"{name}.{part}"))


def _same_parts(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    parts = _parts(a, name)
    return parts == _parts(b, name) and _same_bytes(a, b, [f"{name}.{part}" for part in parts])


def _same_bytes(a: Checkpoint, b: Checkpoint, names: list[str]) -> bool:
    """Whether tensors have the same dtype, shape and bits, a piece at a time."""
    for name in names:
        if not (a.has(name) and b.has(name)):
            return False
        one, other = a.entry(name), b.entry(name)
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        if not all(torch.equal(_bits(x), _bits(y)) for x, y in zip(_pieces(a, name), _pieces(b, name), strict=True)):
            return False
    return True


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[Tensor]:
    shape = checkpoint.entry(name).shape
    if not shape:
        yield checkpoint.read(name)
        return
    step = max(1, CHUNK_BYTES // max(1, checkpoint.entry(name).bytes // max(1, shape[0])))
    for first in range(0, shape[0], step):
        yield checkpoint.read_rows(name, first, min(shape[0], first + step))


def _bits(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def _plain_names(checkpoint: Checkpoint) -> dict[str, None]:
    """All tensors but the routed experts' and the scales of INT8 linears, which count with their weights."""
    return {
        name: None
        for name in checkpoint.names
        if not EXPERT_TENSOR.fullmatch(name) and not name.endswith((".weight_scale", ".weight_zero_point"))
    }


def _experts(checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    entries = {name: checkpoint.entry(name) for name in checkpoint.names}
    for matrix in expert_matrices(entries):
        pieces = matrix.split(".")
        yield int(pieces[2]), int(pieces[5])


def _relative(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0
    return math.sqrt(difference / norm) if norm > 0 else math.inf
