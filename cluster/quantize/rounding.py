"""Rounds one matrix to its format: scales by the recipe's search, integers to the nearest or with error feedback.

Shapes: N rows, K columns, G = K / 32 groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import formats
from ...kernels.quantizer import WeightQuantizer
from .error_feedback import ROW_GROUP, SecondMoments, one_torch_thread, round_with_feedback
from .matrix import QuantizeError, dequantize
from .recipe import Scheme

NO_MOMENTS = (
    "error_feedback needs second moments, which this calibration has not; run `flyray calibrate` with --moments-block"
)


@dataclass(frozen=True)
class MatrixInputs:
    """What calibration says of one matrix; all None: nothing, and it is rounded as without calibration.

    energy: [K] float32, mean square of every column of the matrix's input, None if no token reached it. moments: of
    the same inputs, None where calibration gathered none. column_factor: [K], row_factor: [N] float32, powers of two
    that the weights are multiplied with because smoothing divides their inputs (or what reads their outputs) by them.
    energy and moments are those of the inputs after that division.
    """

    energy: Tensor | None = None
    moments: SecondMoments | None = None
    row_factor: Tensor | None = None
    column_factor: Tensor | None = None

    @property
    def smooths(self) -> bool:
        return self.row_factor is not None or self.column_factor is not None


@dataclass(frozen=True)
class QuantizedMatrix:
    """parts: tensors by the last part of their names, as `matrix.output_specs` has them. difference, norm: squared
    Frobenius norms of the error, with smoothing undone, and of the source's weights. uncalibrated: the scheme asks for
    calibration, but it never reached this matrix."""

    parts: dict[str, Tensor]
    difference: float
    norm: float
    uncalibrated: bool = False


def quantize_matrix(
    scheme: Scheme,
    source_format: str,
    parts: Mapping[str, Tensor],
    inputs: MatrixInputs | None,
    quantizer: WeightQuantizer,
    row_chunk: int,
) -> QuantizedMatrix:
    """source_format: "w4a16" or "bf16" (any floating point dtype), parts: its tensors of this matrix. row_chunk: rows
    that are float32 at a time, as multiples of ROW_GROUP (at least one); the result does not depend on it.

    `w4a8` from native keeps the nibbles and folds scales only. Raises QuantizeError for a scheme that this source or
    these inputs cannot give, ValueError (naming part, row and column) for weights that are not finite or do not fit.
    """
    check_scheme(scheme, source_format, calibrated=inputs is not None, smooths=inputs is not None and inputs.smooths)
    if scheme.format == "w4a8" and source_format == "w4a16":
        return _fold(parts, quantizer)
    with one_torch_thread():
        return _Rounding(scheme, source_format, parts, inputs or MatrixInputs(), quantizer).run(row_chunk)


def check_scheme(scheme: Scheme, source_format: str, *, calibrated: bool, smooths: bool) -> None:
    """Raises QuantizeError for what this source cannot give, or not without calibration. smooths: columns of the
    weights are multiplied before they are rounded."""
    if scheme.by != "flyray":
        raise QuantizeError(f"{scheme.format} by {scheme.by} is not rounded by flyray")
    if source_format not in ("w4a16", "bf16"):
        raise QuantizeError(f"weights in {source_format} are already quantized; quantize the native or bf16 checkpoint")
    if scheme.needs_calibration and not calibrated:
        raise QuantizeError(f"{scheme.format} with {_asked(scheme)} needs a calibration; run `flyray calibrate`")
    if scheme.format == "w4a8" and source_format == "w4a16":
        asked = _asked(scheme) or ("smoothing" if smooths else "")
        if asked:
            raise QuantizeError(
                f"w4a8 from a native checkpoint keeps its INT4 values as they are, so {asked} has nothing to change; "
                "leave it out of the recipe, or quantize a bf16 checkpoint"
            )


def _asked(scheme: Scheme) -> str:
    """What the scheme does beyond plain rounding, in the recipe's words."""
    clip = f"clip: {scheme.clip}" if scheme.clip != "none" else ""
    return " and ".join(filter(None, (clip, "error_feedback" if scheme.error_feedback else "")))


def _fold(parts: Mapping[str, Tensor], quantizer: WeightQuantizer) -> QuantizedMatrix:
    packed = parts["weight_packed"]
    folded = quantizer.fold(packed, parts["weight_scale"])
    made = {
        "weight_packed": packed,
        "weight_multiplier": formats.pack_multipliers(folded.multipliers),
        "weight_scale": folded.scale,
        "weight_shape": _shape(packed.shape[0], packed.shape[1] * formats.PACK),
    }
    return QuantizedMatrix(made, float(folded.difference.sum()), float(folded.norm.sum()))


def _shape(rows: int, columns: int) -> Tensor:
    return torch.tensor([rows, columns], dtype=torch.int32)


@dataclass(frozen=True)
class _Rows:
    """Some rows, rounded: values [n, K] int8, scale [n] float32, multipliers [n, G] uint8 for w4a8."""

    values: Tensor
    scale: Tensor
    multipliers: Tensor | None = None

    def dequantized(self) -> Tensor:
        if self.multipliers is None:
            return formats.dequantize_rows(self.values, self.scale)
        return formats.dequantize_folded(self.values, formats.FoldedScales(self.multipliers, self.scale))


class _Rounding:
    """One run of `quantize_matrix` that rounds."""

    def __init__(
        self,
        scheme: Scheme,
        source_format: str,
        parts: Mapping[str, Tensor],
        inputs: MatrixInputs,
        quantizer: WeightQuantizer,
    ) -> None:
        self._format = scheme.format
        self._clip = scheme.clip != "none"
        self._importance = inputs.energy if scheme.clip == "energy" else None
        self._moments = inputs.moments if scheme.error_feedback else None
        if scheme.error_feedback and inputs.energy is not None and self._moments is None:
            raise QuantizeError(NO_MOMENTS)
        self._uncalibrated = scheme.needs_calibration and inputs.energy is None
        self._source_format = source_format
        self._parts = parts
        self._inputs = inputs
        self._quantizer = quantizer

    def run(self, row_chunk: int) -> QuantizedMatrix:
        made: dict[str, list[Tensor]] = {}
        sums: list[tuple[Tensor, Tensor]] = []
        step = max(1, row_chunk // ROW_GROUP) * ROW_GROUP
        for first, parts in self._chunks(step):
            source = dequantize(self._source_format, parts)
            norm = self._finite_norm(source, first)
            rows = self._round(self._smoothed(source))
            sums.append((self._difference(rows, source), norm))
            for part, tensor in self._packed(rows).items():
                made.setdefault(part, []).append(tensor)
        difference, norm = (float(torch.cat(column).sum()) for column in zip(*sums, strict=True))
        whole = {part: torch.cat(tensors) for part, tensors in made.items()}
        return QuantizedMatrix(self._finished(whole), difference, norm, self._uncalibrated)

    def _chunks(self, step: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        tensors = {part: tensor for part, tensor in self._parts.items() if part != "weight_shape"}
        count = next(iter(tensors.values())).shape[0]
        for first in range(0, count, step):
            yield first, {part: tensor[first : first + step] for part, tensor in tensors.items()}

    def _finite_norm(self, source: Tensor, first: int) -> Tensor:
        """[n] float64, the rows' squared norms."""
        norm = source.square().sum(1, dtype=torch.float64)
        if not bool(norm.isfinite().all()):
            bad = ~source.isfinite()
            if not bool(bad.any()):
                raise ValueError(f"weights of up to {float(source.abs().max()):.1e} are too large to be quantized")
            row, column = (int(i) for i in bad.nonzero()[0])
            part = "weight_scale" if self._source_format == "w4a16" else "weight"
            raise ValueError(
                f"{part}: the weight of row {first + row}, column {column} is {float(source[row, column])}"
            )
        return norm

    def _smoothed(self, source: Tensor) -> Tensor:
        return source if self._inputs.column_factor is None else source * self._inputs.column_factor

    def _round(self, weight: Tensor) -> _Rows:
        quantizer, importance, clip = self._quantizer, self._importance, self._clip
        if self._format == "w4a8":
            return self._round_groups(weight)
        bits = 8 if self._format == "w8a8" else 4
        scale = quantizer.row_scales(weight, bits, importance, clip)
        if self._moments is None:
            return _Rows(quantizer.round_rows(weight, scale, bits), scale)
        limit = (1 << (bits - 1)) - 1
        limits = (-limit, limit) if bits == 8 else (-limit - 1, limit)
        return _Rows(round_with_feedback(weight, scale.unsqueeze(1), limits, self._moments), scale)

    def _round_groups(self, weight: Tensor) -> _Rows:
        """Group scales, their integers, and then the weights once more on the grid that the integers really give."""
        quantizer = self._quantizer
        wanted = quantizer.group_scales(weight, self._importance, self._clip)
        folded = quantizer.fold(formats.pack_native(quantizer.round_groups(weight, wanted)), wanted)
        scale = folded.multipliers.float() * folded.scale.unsqueeze(1)
        if self._moments is None:
            values = quantizer.round_groups(weight, scale)
        else:
            values = round_with_feedback(weight, scale, (-8, 7), self._moments)
        return _Rows(values, folded.scale, folded.multipliers)

    def _difference(self, rows: _Rows, source: Tensor) -> Tensor:
        """[n] float64, squared error of every row against the source, without the smoothing."""
        made = rows.dequantized()
        if self._inputs.column_factor is not None:
            made /= self._inputs.column_factor
        return made.sub_(source).square_().sum(1, dtype=torch.float64)

    def _packed(self, rows: _Rows) -> dict[str, Tensor]:
        match self._format:
            case "w8a8":
                return {"weight": rows.values, "weight_scale": rows.scale}
            case "w4a8-channel":
                return {"weight": formats.pack_awq(rows.values), "weight_scale_2": rows.scale}
            case "w4a8":
                assert rows.multipliers is not None
                return {
                    "weight_packed": formats.pack_native(rows.values),
                    "weight_multiplier": formats.pack_multipliers(rows.multipliers),
                    "weight_scale": rows.scale,
                }
        raise QuantizeError(f"flyray cannot make {self._format}; by: quark can")

    def _finished(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = "weight_scale_2" if self._format == "w4a8-channel" else "weight_scale"
        if self._inputs.row_factor is not None:
            parts[scale] = parts[scale] * self._inputs.row_factor
        if self._format == "w4a8":
            rows, words = parts["weight_packed"].shape
            parts["weight_shape"] = _shape(rows, words * formats.PACK)
        if self._format == "w4a8-channel":
            # Of Quark's two scales only the product counts; this one alike for all rows, so that rows may come apart.
            parts["weight_scale"] = torch.tensor(1.0)
        return parts
