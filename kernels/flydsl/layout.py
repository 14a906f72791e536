"""Expert matrices as waves read them: 16 bytes a lane, 1 KiB in one run; made once, on loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..protocol import ExpertWeights, Int4Matrix, Int8Matrix
from .shape import FEW, unit_count
from .wave_maps import LANE_WORDS, PACKED, PIECE, ROWS, TILES, WAVE

_ZERO_NIBBLES = 0x88
_UNSORTED_PAIRS = 8
_EXPERTS_AT_ONCE = 8


@dataclass(frozen=True)
class WaveMatrix:
    """One expert matrix [E, N, K] in units of 32 rows, of two tiles each; what is beyond N and K multiplies as zeros.

    kind: what it was made of. words: [E, units, 2, pieces, 64, 4] int32. multipliers: [E, units, 2, pieces / 4, 64]
    int16, INT4 only: 4 bits a piece, of the lane's row and group. scale: [E, units, 2, 16] float32. gated: the tiles of
    a unit are 16 rows of the gate and the same of up, else neighbours. rows, inner: N and K.
    """

    kind: type[Int4Matrix] | type[Int8Matrix]
    words: Tensor
    multipliers: Tensor | None
    scale: Tensor
    gated: bool
    rows: int
    inner: int

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.kind is Int4Matrix else 8

    @property
    def experts(self) -> int:
        """E."""
        return self.words.shape[0]

    @property
    def units(self) -> int:
        """Of an expert, a multiple of `WAVES`."""
        return self.words.shape[1]

    @property
    def pieces(self) -> int:
        """Along K."""
        return self.words.shape[3]


@dataclass(frozen=True)
class WaveExperts:
    """`ExpertWeights` as waves read them.

    alone: [8, 4] int32, the order of blocks of one pair each (`PairBlocks`): so few are not worth sorting.
    """

    gate_up: WaveMatrix
    down: WaveMatrix
    alone: Tensor


def wave_experts(weights: ExpertWeights) -> WaveExperts:
    """The weights of one layer, on the same device. Raises ValueError for FP8 and bf16."""
    gate_up, down = wave_matrix(weights.gate_up, True), wave_matrix(weights.down, False)
    alone = torch.full((_UNSORTED_PAIRS, FEW), torch.iinfo(torch.int32).max, dtype=torch.int32)
    alone[:, 0] = torch.arange(_UNSORTED_PAIRS)
    return WaveExperts(gate_up, down, alone.to(gate_up.words.device))


def wave_matrix(matrix: object, gated: bool) -> WaveMatrix:
    """gated: the rows are the gate's and then up's. Beside the result, it holds 8 experts at a time."""
    if isinstance(matrix, Int4Matrix):
        codes, inner, fill = matrix.nibbles, matrix.nibbles.shape[2] * 2, _ZERO_NIBBLES
    elif isinstance(matrix, Int8Matrix):
        codes, inner, fill = matrix.values.view(torch.uint8), matrix.values.shape[2], 0
    else:
        raise ValueError(f"an expert matrix is a {type(matrix).__name__}; FlyDSL kernels run INT4 and INT8")
    kind, (experts, rows) = type(matrix), codes.shape[:2]
    pieces = _pieces(inner, 4 if kind is Int4Matrix else 8)
    tiles = (experts, unit_count(rows, gated), TILES, pieces)
    words = torch.empty((*tiles, WAVE, LANE_WORDS), dtype=torch.int32, device=codes.device)
    multipliers = None
    if isinstance(matrix, Int4Matrix):
        multipliers = torch.empty((*tiles[:3], pieces // PACKED, WAVE), dtype=torch.int16, device=codes.device)
    for begin in range(0, experts, _EXPERTS_AT_ONCE):
        part = slice(begin, begin + _EXPERTS_AT_ONCE)
        # A piece of a row is 64 bytes: the 16 of each of its four lanes.
        lanes = _tiles(codes[part], rows, gated, pieces * 64, fill).unflatten(-1, (pieces, 4, 16))
        words[part] = lanes.permute(0, 1, 2, 4, 5, 3, 6).contiguous().view(torch.int32).flatten(4, 5)
        if isinstance(matrix, Int4Matrix) and multipliers is not None:
            multipliers[part] = _packed(_tiles(matrix.multipliers[part], rows, gated, pieces * 4, 1), pieces)
    scale = _tiles(matrix.scale[..., None], rows, gated, 1, 0)[..., 0]
    return WaveMatrix(kind, words, multipliers, scale.contiguous(), gated, rows, inner)


def _packed(multipliers: Tensor, pieces: int) -> Tensor:
    """[E, units, 2, 16 rows, pieces * 4 parts] -> [E, units, 2, pieces / 4, 64 lanes], 4 bits a piece."""
    quads = multipliers.to(torch.int16).unflatten(-1, (pieces // PACKED, PACKED, 4))
    packed = quads[..., 0, :]
    for piece in range(1, PACKED):
        packed = packed | (quads[..., piece, :] << (4 * piece))
    return packed.permute(0, 1, 2, 4, 5, 3).flatten(-2)


def _pieces(inner: int, bits: int) -> int:
    """Along K, a multiple of 4."""
    whole = PACKED * PIECE[bits]
    return -(-inner // whole) * PACKED


def _tiles(values: Tensor, rows: int, gated: bool, width: int, fill: int) -> Tensor:
    """[E, N, W] -> [E, units, 2, 16, width], padded."""
    height = rows // 2 if gated else rows
    unit = ROWS if gated else ROWS * TILES
    units = unit_count(rows, gated)
    parts = values.unflatten(1, (2, height)) if gated else values[:, None]
    parts = pad(parts, (0, width - values.shape[2], 0, units * unit - height), value=fill)
    if gated:
        return parts.unflatten(2, (units, ROWS)).transpose(1, 2)
    return parts[:, 0].unflatten(1, (units, TILES, ROWS))


__all__ = ["WaveExperts", "WaveMatrix", "wave_experts", "wave_matrix"]
