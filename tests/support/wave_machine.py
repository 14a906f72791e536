"""A wave of gfx942 in NumPy: what the FlyDSL product does, lane by lane, by the maps that the kernel itself uses.

The instructions are those of AMD's CDNA3 ISA guide: `v_pk_mad_u16` with the low half of its last two operands in both
halves, and `v_mfma_i32_16x16x32_i8`, whose lane l gives 8 bytes of row l % 16 for k = 8 * (l // 16)...
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flyray.kernels.flydsl import wave_maps as maps
from flyray.kernels.flydsl.experts import Launcher
from flyray.kernels.flydsl.layout import WaveMatrix
from flyray.kernels.flydsl.shape import ProductShape
from flyray.kernels.ordered import ordered_silu
from flyray.kernels.protocol import Int4Matrix, Int8Matrix

LANES = np.arange(maps.WAVE)


def multiply_add(x: np.ndarray, factor: np.ndarray, added: np.ndarray) -> np.ndarray:
    """`v_pk_mad_u16` on registers as uint64, with the wrap-around of the hardware."""
    low, high = x & 0xFFFF, x >> 16
    factor, added = factor & 0xFFFF, added & 0xFFFF
    return ((low * factor + added) & 0xFFFF) | (((high * factor + added) & 0xFFFF) << 16)


def matrix_instruction(left: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """left, right: [64, 2] words; total: [64, 4] int32 -> total plus the product of 16 x 32 by 32 x 16 bytes."""
    factors = []
    for words in (left, right):
        signed = words.astype("<u4").view(np.int8).reshape(4, 16, 8).astype(np.int64)  # part, row or token, byte
        factors.append(signed.transpose(1, 0, 2).reshape(16, 32))
    product = factors[0] @ factors[1].T
    registers = [product[maps.result_row(LANES, i), maps.lane_row(LANES)] for i in range(4)]
    return total + np.stack(registers, axis=1).astype(np.int32)


def machine_launcher(shape: ProductShape) -> Launcher:
    """A compiled product's launch, executed block by block."""

    def launch(words, multipliers, scale, x, x_scale, pair_row, order, block_expert, out, pairs, x_bytes, blocks):
        lanes = (-1, shape.units, maps.TILES, shape.pieces, maps.WAVE, maps.LANE_WORDS)
        four = shape.bits == 4
        matrix = WaveMatrix(
            Int4Matrix if four else Int8Matrix,
            words.view(lanes),
            multipliers.view(-1, shape.units, maps.TILES, shape.pieces // 4, maps.WAVE) if four else None,
            scale.view(-1, shape.units, maps.TILES, maps.ROWS),
            shape.gated,
            shape.rows * 2 if shape.gated else shape.rows,
            shape.inner,
        )
        assert (x.nbytes, len(block_expert)) == (x_bytes, blocks)
        rows, results = x.view(torch.int8).view(-1, shape.inner), out.view(pairs, shape.rows)
        for expert, places in zip(block_expert.tolist(), order.view(-1, shape.tokens), strict=True):
            used = places[places < pairs].long() if expert >= 0 else places[:0].long()
            for own in used.split(maps.ROWS):
                source = pair_row[own].long() if shape.gated else own
                block, block_scale = torch.zeros(maps.ROWS, shape.inner, dtype=torch.int8), torch.zeros(maps.ROWS)
                block[: len(own)], block_scale[: len(own)] = rows[source], x_scale[source]
                results[own] = product(matrix, expert, block, block_scale, matrix.scale)[: len(own)]

    return launch


def product(matrix: WaveMatrix, expert: int, values: Tensor, row_scale: Tensor, weights_scale: Tensor) -> Tensor:
    """values [16, K] int8 and row_scale [16] float32 times one expert's matrix -> [16, N or N / 2] float32."""
    columns = matrix.pieces * maps.PIECE[matrix.bits]
    padded = np.zeros((maps.ROWS, columns), dtype=np.int8)
    padded[:, : values.shape[1]] = values.numpy()
    tiles = [
        _epilogue(_totals(matrix, expert, unit, tile, padded), row_scale, weights_scale[expert, unit, tile])
        for unit in range(matrix.units)
        for tile in range(maps.TILES)
    ]
    if matrix.gated:
        pairs = zip(tiles[0::2], tiles[1::2], strict=True)
        return torch.cat([ordered_silu(gate) * up for gate, up in pairs], dim=1)[:, : matrix.rows // 2].contiguous()
    return torch.cat(tiles, dim=1)[:, : matrix.rows]


def _totals(matrix: WaveMatrix, expert: int, unit: int, tile: int, padded: np.ndarray) -> np.ndarray:
    """A wave's sums of one tile of rows: [64, 4] int32."""
    total = np.zeros((maps.WAVE, 4), dtype=np.int32)
    for piece in range(matrix.pieces):
        words = matrix.words[expert, unit, tile, piece].numpy().view(np.uint32).astype(np.uint64)
        left = _left(matrix, words, expert, unit, tile, piece)
        right = _right(matrix.bits, padded, piece)
        for step in range(len(left) // 2):
            two = [np.stack(run[2 * step : 2 * step + 2], axis=1) for run in (left, right)]
            total = matrix_instruction(two[0], two[1], total)
    return total


def _left(matrix: WaveMatrix, words: np.ndarray, expert: int, unit: int, tile: int, piece: int) -> list[np.ndarray]:
    if matrix.multipliers is None:
        return [words[:, i] for i in range(4)]
    packed = matrix.multipliers[expert, unit, tile, piece // 4].numpy().view(np.uint16).astype(np.int64)
    factor = maps.multiplier(packed, piece)
    added = maps.offset(factor)
    parts = [factor.astype(np.uint64), (added & 0xFFFFFFFF).astype(np.uint64)]
    return [each for i in range(4) for each in maps.unpacked(words[:, i], parts[0], parts[1], multiply_add)]


def _right(bits: int, padded: np.ndarray, piece: int) -> list[np.ndarray]:
    """The words of activations that each lane reads for a piece, in the order of the instructions."""
    size = maps.LANE_VALUES[bits]
    begin = piece * maps.PIECE[bits] + maps.lane_part(LANES) * size
    columns = begin[:, None] + np.arange(size)
    loaded = padded[maps.lane_row(LANES)[:, None], columns].view("<u4").astype(np.uint64)  # [64, 8 or 4] words
    first = [loaded[:, i] for i in range(4)]
    if bits == 8:
        return first
    read = maps.activation_words(first, [loaded[:, 4 + i] for i in range(4)])
    return [*read[0], *read[1]]


def _epilogue(total: np.ndarray, row_scale: Tensor, scale: Tensor) -> Tensor:
    """[64, 4] sums -> [16 tokens, 16 rows] float32."""
    result = torch.empty(maps.ROWS, maps.ROWS)
    for register in range(4):
        rows, tokens = maps.result_row(LANES, register), maps.lane_row(LANES)
        sums = torch.from_numpy(total[:, register]).to(torch.float32)
        result[tokens, rows] = sums * row_scale[tokens] * scale[rows]
    return result
