"""What calibration says of each matrix of a checkpoint, and what smoothing does to the tensors beside it.

gate_proj and up_proj of all experts read the layer's input; down_proj reads its own expert's inner activations. So
smoothing divides the layer's input (in post_attention_layernorm) by factors that every reader's columns are multiplied
with: the router, the shared experts and all routed experts. An expert's inner activations are divided through the rows
of its up_proj, and its down_proj's columns multiplied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from ...actors.statistics import LayerStatistics, Statistics
from .error_feedback import SecondMoments
from .matrix import QuantizeError
from .rounding import MatrixInputs
from .smoothing import smoothing_factors

_MODULE = re.compile(
    r"model\.layers\.(?P<layer>\d+)\."
    r"(?P<place>post_attention_layernorm|mlp\.gate|mlp\.shared_experts|mlp\.experts\.(?P<expert>\d+))"
    r"(?:\.(?P<projection>gate_proj|up_proj|down_proj))?"
)
PACKED_COLUMNS = (
    "smoothing multiplies columns, which packed INT4 cannot take; "
    "let the recipe quantize every routed expert of the layer, or leave smoothing out"
)


class Calibrated:
    """Statistics as `rounding.quantize_matrix` needs them. smoothing: the exponent, None for none.

    The last layer and the last matrix asked for are kept, so matrices are best asked for layer by layer. With second
    moments of B columns a block that is 4 D B bytes for the layer's and as much for their factor, which gate_proj and
    up_proj of all experts share: 205 MB each at D = B = 7168 (and four times that while they are read and worked out),
    7 MB each at B = 256; and the same with I for the inner moments of the last expert whose down_proj was asked for.
    """

    def __init__(self, statistics: Statistics, smoothing: float | None) -> None:
        self.statistics = statistics
        self.smoothing = smoothing
        self._last: tuple[int, _Layer] | None = None
        self._last_matrix: tuple[str, MatrixInputs] | None = None

    def matrix(self, name: str) -> MatrixInputs:
        """name: of a matrix or linear, such as "model.layers.3.mlp.experts.5.up_proj". Of what calibration does not
        gather (attention, dense layers, the shared experts' down_proj) all fields are None.

        Raises QuantizeError for statistics that are not finite, and for an expert that they do not have.
        """
        if self._last_matrix is None or self._last_matrix[0] != name:
            with self._named(name):
                self._last_matrix = (name, self._matrix(name))
        return self._last_matrix[1]

    def copied(self, name: str) -> Tensor | None:
        """What the tensor `name` ("model.layers.3.mlp.gate.weight"), if its values stay as they are, must be multiplied
        with elementwise: powers of two that broadcast to its shape; None for nothing.

        Raises QuantizeError for an expert's matrix that is packed, for its columns cannot be multiplied, and for
        statistics that are not finite.
        """
        if self.smoothing is None:
            return None
        with self._named(name):
            return self._factor(name)

    def _factor(self, name: str) -> Tensor | None:
        module, _, part = name.rpartition(".")
        layer, match = self._find(module)
        if layer is None or match is None:
            return None
        if match["expert"] is not None:
            if part != "weight":
                raise ValueError(PACKED_COLUMNS)
            return _product(self.matrix(module))
        if part != "weight":
            return None
        if match["place"] == "post_attention_layernorm":
            return layer.input_factor.reciprocal()
        return None if match["projection"] == "down_proj" else layer.input_factor

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise QuantizeError(f"{self.statistics.path}: {name}: {error}") from error

    def _matrix(self, name: str) -> MatrixInputs:
        layer, match = self._find(name)
        if layer is not None and match is not None:
            if match["expert"] is not None:
                return layer.expert(int(match["expert"]), match["projection"])
            if match["place"] == "mlp.shared_experts" and match["projection"] != "down_proj":
                return layer.shared
        return MatrixInputs()

    def _find(self, module: str) -> tuple[_Layer | None, re.Match[str] | None]:
        match = _MODULE.fullmatch(module)
        if match is None or int(match["layer"]) not in self.statistics.layers:
            return None, match
        number = int(match["layer"])
        if self._last is None or self._last[0] != number:
            self._last = self._last_matrix = None  # before the next is read, so that two are never alive
            self._last = (number, _Layer(self.statistics.layer(number), self.statistics.tokens, self.smoothing))
        return self._last[1], match


class _Layer:
    """One layer's statistics, smoothed. tokens: that were run."""

    def __init__(self, statistics: LayerStatistics, tokens: int, smoothing: float | None) -> None:
        self._statistics = statistics
        self._tokens = tokens
        self._smoothing = smoothing

    @cached_property
    def input_factor(self) -> Tensor:
        """[D] float32: what the layer's input is divided by; ones without smoothing."""
        return self._factor(self._statistics.input_absmax.amax(0))

    @cached_property
    def shared(self) -> MatrixInputs:
        """Of gate_proj and up_proj of the shared experts, which read what all the routed experts read."""
        statistics = self._statistics
        count = int(statistics.count.sum())
        energy = self._energy(statistics.input_energy.sum(0), count, self.input_factor)
        return MatrixInputs(energy, self._input_moments, column_factor=self._or_none(self.input_factor))

    def expert(self, expert: int, projection: str | None) -> MatrixInputs:
        statistics = self._statistics
        if expert >= len(statistics.count):
            raise ValueError(f"the statistics have experts 0..{len(statistics.count) - 1}")
        count = int(statistics.count[expert])
        inner = self._factor(statistics.inner_absmax[expert])
        if projection == "down_proj":
            energy = self._energy(statistics.inner_energy[expert], count, inner)
            moments = statistics.inner_moments(expert) if count else None
            return MatrixInputs(energy, _moments(moments, count, inner), column_factor=self._or_none(inner))
        return MatrixInputs(
            energy=self._energy(statistics.input_energy[expert], count, self.input_factor),
            moments=self._input_moments if count else None,
            row_factor=self._or_none(inner.reciprocal()) if projection == "up_proj" else None,
            column_factor=self._or_none(self.input_factor),
        )

    @cached_property
    def _input_moments(self) -> SecondMoments | None:
        return _moments(self._statistics.input_moments, self._tokens, self.input_factor)

    def _factor(self, absmax: Tensor) -> Tensor:
        if self._smoothing is None:
            return torch.ones_like(absmax)
        return smoothing_factors(absmax, self._smoothing)

    def _or_none(self, factor: Tensor) -> Tensor | None:
        return None if self._smoothing is None else factor

    @staticmethod
    def _energy(total: Tensor, count: int, factor: Tensor) -> Tensor | None:
        """[K] float32, mean squares after smoothing; None if there was nothing to take a mean of."""
        if not bool((total.isfinite() & (total >= 0)).all()):
            raise ValueError("sums of squares of activations are negative or not finite; calibrate again")
        return total / count / factor.square() if count else None


def _moments(blocks: Tensor | None, tokens: int, factor: Tensor) -> SecondMoments | None:
    if blocks is None or not tokens:
        return None
    each = factor.reciprocal().view(blocks.shape[0], -1)
    return SecondMoments(blocks * each.unsqueeze(1) * each.unsqueeze(2), tokens)


def _product(inputs: MatrixInputs) -> Tensor | None:
    """Both factors of a matrix, as one that broadcasts to [N, K]."""
    rows, columns = inputs.row_factor, inputs.column_factor
    if rows is None or columns is None:
        return columns if rows is None else rows.unsqueeze(1)
    return rows.unsqueeze(1) * columns
