"""A wave of gfx942 in NumPy: what the FlyDSL product does, lane by lane, by the maps that the kernel itself uses.

The instructions are those of AMD's CDNA3 ISA guide: `v_pk_mad_u16` with the low half of its last two operands in both
halves, and `v_mfma_i32_16x16x32_i8`, whose lane l gives 8 bytes of row l % 16 for k = 8 * (l // 16)...
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from flyray.kernels.flydsl import wave_maps as maps
from flyray.kernels.flydsl.experts import Launcher
from flyray.kernels.flydsl.layout import WaveMatrix
from flyray.kernels.flydsl.shape import WAVES, ProductShape
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

    def launch(
        words, multipliers, scale, x, x_scale, pair_row, order, block_expert, out, pairs, experts, x_bytes, blocks
    ):
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
        assert (x.nbytes, len(block_expert), len(matrix.words)) == (x_bytes, blocks, experts)
        results = out.view(pairs, shape.rows)
        for expert, places in zip(block_expert.tolist(), order.view(-1, shape.tokens), strict=True):
            used = (places < pairs).numpy()
            pair = torch.where(places < pairs, places, 0).long()
            source = pair_row[pair].long() if shape.gated else pair
            if 0 <= expert < experts and used.any():
                begins = np.where(used, source.numpy() * shape.inner, -1)
                found = product(shape, matrix, expert, x.view(torch.int8).numpy(), begins, x_scale[source])
                results[pair[used]] = found[used]

    return launch


def product(
    shape: ProductShape, matrix: WaveMatrix, expert: int, x: np.ndarray, begins: np.ndarray, row_scale: Tensor
) -> Tensor:
    """One expert's matrix times a block's activations -> [tokens, rows] float32, the rows of unused places undefined.

    begins: [tokens], in the bytes x, where each place's activations begin, -1 of an unused one. row_scale: [tokens].
    """
    rights = [staged(shape, x, begins, turn) for turn in range(shape.bodies * shape.turns)]
    tiles = []
    for unit in range(matrix.units):
        for tile in range(maps.TILES):
            totals = _totals(shape, matrix, expert, unit, tile, rights)
            tiles.append(_epilogue(shape, totals, row_scale, matrix.scale[expert, unit, tile]))
    if shape.gated:
        pairs = zip(tiles[0::2], tiles[1::2], strict=True)
        return torch.cat([ordered_silu(gate) * up for gate, up in pairs], dim=1)[:, : shape.rows].contiguous()
    return torch.cat(tiles, dim=1)[:, : shape.rows]


def writes(shape: ProductShape) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What the threads that bring a turn's activations do, load by load: of each its token, its unit of the turn, and
    the word of the buffer that it writes 16 bytes to."""
    threads = np.arange(maps.WAVE if shape.split > 1 else WAVES * maps.WAVE)
    found = []
    for load in range(shape.loads):
        number = threads + load * len(threads)
        token, unit = number // shape.token_units, number % shape.token_units
        piece, part, run = maps.unit_place(shape.bits, unit)
        slot = maps.lds_slot(shape.height, token % shape.height, part, run if shape.runs > 1 else piece)
        found.append((token, unit, _run(shape, piece, token // shape.height, run) + slot * maps.LANE_WORDS))
    return found


def reads(shape: ProductShape, piece: int, token_tile: int, run: int) -> np.ndarray:
    """The words of the buffer where a wave's lanes read 16 bytes each."""
    part, token = maps.lane_part(LANES), maps.lane_row(LANES) % shape.height
    slot = maps.lds_slot(shape.height, token, part, run if shape.runs > 1 else piece)
    return _run(shape, piece, token_tile, run) + slot * maps.LANE_WORDS


def _run(shape: ProductShape, piece, token_tile, run):
    return ((piece * shape.token_tiles + token_tile) * shape.runs + run) * shape.run_words


def staged(shape: ProductShape, x: np.ndarray, begins: np.ndarray, turn: int) -> list[list[list[list[np.ndarray]]]]:
    """The right factors of a turn as the waves read them: by the wave's part of K, piece and 16 tokens."""
    found, width = [], shape.token_units * maps.LANE_BYTES
    # What is loaded from beyond the buffer is zero.
    space = np.concatenate([x, np.zeros(max(begins.max(), 0) + (shape.pieces + 64) * 128, dtype=np.int8)])
    for part in range(shape.split):
        lds = np.full((shape.buffer_words, 4), 77, dtype=np.int8)
        for token, unit, word in writes(shape):
            byte = begins[token] + (turn * shape.split + part) * width + unit * maps.LANE_BYTES
            loaded = space[np.where(begins[token] < 0, len(x), byte)[:, None] + np.arange(maps.LANE_BYTES)]
            lds[word[:, None] + np.arange(4)] = loaded.reshape(-1, 4, 4)
        words = lds.view("<u4")[:, 0].astype(np.uint64)
        found.append(
            [[_right(shape, words, piece, tile) for tile in range(shape.token_tiles)] for piece in range(shape.chunk)]
        )
    return found


def _right(shape: ProductShape, words: np.ndarray, piece: int, token_tile: int) -> list[np.ndarray]:
    runs = []
    for run in range(shape.runs):
        at = reads(shape, piece, token_tile, run)
        runs.append([words[at + i] for i in range(4)])
    return [np.stack(pair, axis=1) for pair in maps.right_pairs(runs)]


def _totals(shape: ProductShape, matrix: WaveMatrix, expert: int, unit: int, tile: int, rights) -> list[np.ndarray]:
    """The sums of one tile of rows over all waves that share it, [64, 4] int32 for every 16 tokens."""
    totals = [np.zeros((maps.WAVE, 4), dtype=np.int32) for _ in range(shape.token_tiles)]
    for turn, parts in enumerate(rights):
        body, within = divmod(turn, shape.turns)
        for part, pieces in enumerate(parts):
            for number, tokens in enumerate(pieces):
                piece = (body * shape.split + part) * shape.ahead + within * shape.chunk + number
                if piece >= matrix.pieces:
                    continue  # weights from beyond their buffer are zeros
                left = _left(matrix, expert, unit, tile, piece)
                for column, right in enumerate(tokens):
                    for one, other in zip(left, right, strict=True):
                        totals[column] = matrix_instruction(one, other, totals[column])
    return totals


def _left(matrix: WaveMatrix, expert: int, unit: int, tile: int, piece: int) -> list[np.ndarray]:
    words = matrix.words[expert, unit, tile, piece].numpy().view(np.uint32).astype(np.uint64)
    unpack = None
    if matrix.multipliers is not None:
        packed = matrix.multipliers[expert, unit, tile, piece // 4].numpy().view(np.uint16).astype(np.int64)
        factor = maps.multiplier(packed, piece)
        added = (maps.offset(factor) & 0xFFFFFFFF).astype(np.uint64)
        unpack = partial(maps.unpacked, factor=factor.astype(np.uint64), added=added, multiply_add=multiply_add)
    return [np.stack(pair, axis=1) for pair in maps.left_pairs([words[:, i] for i in range(4)], unpack)]


def _epilogue(shape: ProductShape, totals: list[np.ndarray], row_scale: Tensor, scale: Tensor) -> Tensor:
    """Sums of 16 tokens each -> [tokens, 16 rows] float32."""
    result = torch.empty(len(totals) * maps.ROWS, maps.ROWS)
    scales = torch.nn.functional.pad(row_scale, (0, len(result) - len(row_scale)))
    for tile, total in enumerate(totals):
        for register in range(4):
            rows, tokens = maps.result_row(LANES, register), maps.lane_row(LANES) + tile * maps.ROWS
            sums = torch.from_numpy(total[:, register]).to(torch.float32)
            result[tokens, rows] = sums * scales[tokens] * scale[rows]
    return result[: shape.tokens]
