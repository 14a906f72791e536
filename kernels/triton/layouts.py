"""The layout in which the GPU reads expert matrices: tiles of 128 rows by 128 bytes, each 16 KiB in one piece.

A tile is what one step of a kernel's loop over K loads, so that DRAM is read in long runs. It is made once, on loading.
INT4 tiles hold 256 values a row: byte j has k = j in its low and k = j + 128 in its high nibble, so the halves of a
tile multiply two pieces of the activations and no register is shuffled. Rows of gate and up alternate in blocks of 8:
a gate value and its up value then end in registers of one thread, where SiLU joins them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..protocol import Bf16Matrix, ExpertMatrix, ExpertWeights, Fp8Matrix, Int4Matrix, Int8Matrix

ROWS = 128
"""Rows of a tile."""
ROW_BYTES = 128
_INTERLEAVED = 8
_GROUP = 32
_NIBBLE_ZERO, _MULTIPLIER_ONE = 8, 1
_EXPERTS_AT_ONCE = 8


@dataclass(frozen=True)
class TiledMatrix:
    """One expert matrix [E, N, K] as tiles; rows beyond N and columns beyond K multiply as zeros.

    kind: the type it was made from. tiles: [E, N tiles, K tiles, 128, 128] uint8, the bytes of INT4, INT8, FP8 or bf16
    values. multipliers, INT4 only: [E, N tiles, K tiles, 128, 4] uint8, byte g of a row that of its group g in its low
    and of group g + 4 in its high nibble. scale: [E, N tiles * 128] float32, but for bf16.
    experts, rows, inner: E, N and K.
    """

    kind: type[ExpertMatrix]
    tiles: Tensor
    multipliers: Tensor | None
    scale: Tensor | None
    experts: int
    rows: int
    inner: int


@dataclass(frozen=True)
class TiledExperts:
    """`ExpertWeights` as tiles. gate_up: gate and up rows alternate in blocks of 8, each padded to whole 64."""

    gate_up: TiledMatrix
    down: TiledMatrix


def tile_columns(kind: type[ExpertMatrix]) -> int:
    """How many values of K one tile holds."""
    return {Int4Matrix: 2 * ROW_BYTES, Int8Matrix: ROW_BYTES, Fp8Matrix: ROW_BYTES, Bf16Matrix: ROW_BYTES // 2}[kind]


def tile_experts(weights: ExpertWeights) -> TiledExperts:
    """The weights of one layer as tiles, on the same device; beside the result, it holds 8 experts at a time."""
    return TiledExperts(tile_matrix(weights.gate_up, gated=True), tile_matrix(weights.down, gated=False))


def tile_matrix(matrix: ExpertMatrix, gated: bool) -> TiledMatrix:
    """gated: the rows are gate's and then up's, and become interleaved."""
    kind, codes = type(matrix), matrix.nibbles if isinstance(matrix, Int4Matrix) else matrix.values
    experts, rows = codes.shape[:2]
    inner = codes.shape[2] * (2 if isinstance(matrix, Int4Matrix) else 1)
    height = -(-rows // ROWS) if not gated else -(-(rows // 2) // (ROWS // 2))
    depth = -(-inner // tile_columns(kind))
    tiles = torch.empty((experts, height, depth, ROWS, ROW_BYTES), dtype=torch.uint8, device=codes.device)
    multipliers = scale = None
    if isinstance(matrix, Int4Matrix):
        multipliers = torch.empty((experts, height, depth, ROWS, 4), dtype=torch.uint8, device=codes.device)
    for begin in range(0, experts, _EXPERTS_AT_ONCE):
        part = slice(begin, begin + _EXPERTS_AT_ONCE)
        if isinstance(matrix, Int4Matrix):
            assert multipliers is not None
            values = _grouped_nibbles(matrix.nibbles[part])
            tiles[part] = _two_halves(_padded(values, height, depth * 2 * ROW_BYTES, gated, _NIBBLE_ZERO), depth)
            groups = _padded(matrix.multipliers[part], height, depth * 8, gated, _MULTIPLIER_ONE)
            multipliers[part] = _two_halves(groups, depth)
        else:
            values = codes[part].contiguous().view(torch.uint8)
            padded = _padded(values, height, depth * ROW_BYTES, gated, 0)
            tiles[part] = padded.view(-1, height, ROWS, depth, ROW_BYTES).transpose(2, 3)
    if not isinstance(matrix, Bf16Matrix):
        scale = _padded(matrix.scale[..., None], height, 1, gated, 0)[..., 0].contiguous()
    return TiledMatrix(kind, tiles, multipliers, scale, experts, rows, inner)


def _grouped_nibbles(nibbles: Tensor) -> Tensor:
    """[E, N, K/2] in `Int4Matrix`'s order -> offset-binary values [E, N, K]."""
    groups = nibbles.unflatten(-1, (-1, _GROUP // 2))
    return torch.cat([groups & 15, groups >> 4], dim=-1).flatten(-2)


def _two_halves(values: Tensor, depth: int) -> Tensor:
    """[E, rows, depth * 2 * n] of 4 bits each -> [E, row tiles, depth, 128, n], the first halves in the low nibbles."""
    experts, rows = values.shape[:2]
    halves = values.view(experts, rows // ROWS, ROWS, depth, 2, -1).transpose(2, 3)
    return halves[..., 0, :] | (halves[..., 1, :] << 4)


def _padded(values: Tensor, height: int, width: int, gated: bool, fill: int) -> Tensor:
    """[E, N, W] -> [E, height * 128, width], gate and up rows interleaved where `gated`."""
    experts, rows, columns = values.shape
    if not gated:
        return pad(values, (0, width - columns, 0, height * ROWS - rows), value=fill)
    halves = values.view(experts, 2, rows // 2, columns)
    halves = pad(halves, (0, width - columns, 0, height * ROWS // 2 - rows // 2), value=fill)
    return halves.view(experts, 2, -1, _INTERLEAVED, width).transpose(1, 2).reshape(experts, height * ROWS, width)


__all__ = ["ROWS", "TiledExperts", "TiledMatrix", "tile_columns", "tile_experts", "tile_matrix"]
