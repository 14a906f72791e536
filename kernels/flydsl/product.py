"""One kernel: a tile of rows of an expert's matrix times a block of its activations, with the epilogue fused.

A program has 4 waves. Each multiplies 32 rows of weights, which only it reads, with the same activations, which all
four share in LDS, two buffers in turns; for few tokens they share the rows instead, each has its own part of K, and
nobody waits for another before the sums are added. Weights come straight into registers and are replaced by those of
the loop's next run as soon as they are used. Sums are exact integers; the epilogue rounds as the reference does.
"""

# FlyDSL traces these functions; its values are typed for its compiler.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportFunctionMemberAccess=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl._mlir import ir
from flydsl.expr import gpu, range_constexpr, rocdl
from flydsl.expr.typing import Vector

from . import wave_maps as maps
from .block import Block
from .lane_values import as_vectors, load_word, matrix_product, silu
from .shape import THREADS, WAVES, ProductShape
from .unit import Unit

_MATRIX, _VECTOR, _READS = 0x8, 0x7, 0x100  # kinds of instructions, as the compiler's scheduler counts them


def _keep_order(shape) -> None:
    """The compiler moves no load from global memory and no write to LDS across; and no unpacking where no barrier
    holds it back, for it would do all of a loop's at once and run out of registers."""
    rocdl.sched_barrier(_MATRIX | _READS | (_VECTOR if shape.split == 1 else 0))


class _State:
    """What the loop carries on: sums, weights and multipliers of a run of its body, activations of its first turn."""

    def __init__(self, shape, values) -> None:
        sums, quads = maps.TILES * shape.token_tiles, maps.TILES * shape.ahead
        packed = maps.TILES * (shape.ahead // maps.PACKED) if shape.bits == 4 else 0
        self.totals = as_vectors(values[:sums])
        self.weights = as_vectors(values[sums : sums + quads])
        self.packed = [fx.Int32(each) for each in values[sums + quads : sums + quads + packed]]
        self.rows = as_vectors(values[sums + quads + packed :])

    def values(self) -> list:
        return [*self.totals, *self.weights, *self.packed, *self.rows]


def _first_state(shape, unit: Unit, block: Block) -> _State:
    """Loads in the order in which the loop's body leaves them on their way, so that it waits for no younger one."""
    start, weights = fx.Int32(0), []
    packed = unit.load_multipliers(start)
    for piece in range(shape.ahead):
        if piece == shape.ahead - shape.chunk:
            rows = block.load(start, 0)
            _keep_order(shape)
        weights += unit.load(start, piece)
        _keep_order(shape)
    zeros = [Vector.filled(4, 0, fx.Int32)] * (maps.TILES * shape.token_tiles)
    return _State(shape, [*zeros, *weights, *packed, *rows])


def _run_body(shape, unit: Unit, block: Block, state: _State, body) -> None:
    """One run of the loop's body: each piece's weights are replaced by those of the next run once they are used."""
    following = body + fx.Int32(1)
    packed = unit.load_multipliers(following)
    for turn in range(shape.turns):
        block.keep(state.rows, turn)
        if shape.split == 1:
            gpu.barrier()
        last = turn == shape.turns - 1
        state.rows = block.load(following if last else body, 0 if last else turn + 1)
        _keep_order(shape)
        for piece in range(shape.chunk):
            number = turn * shape.chunk + piece
            _multiply(shape, unit, state, number, block.factors(piece, turn))
            state.weights[maps.TILES * number : maps.TILES * (number + 1)] = unit.load(following, number)
            _keep_order(shape)
    state.packed = packed


def _multiply(shape, unit: Unit, state: _State, piece: int, right: list[list[list[fx.Int32]]]) -> None:
    """Adds the products of a piece to the sums, of both tiles and every 16 tokens."""
    for tile in range(maps.TILES):
        left = unit.left(state.weights[maps.TILES * piece + tile], state.packed, tile, piece)
        for step, words in enumerate(left):
            for tokens, pairs in enumerate(right):
                number = tile * shape.token_tiles + tokens
                state.totals[number] = matrix_product(words, pairs[step], state.totals[number])


def _results(shape, unit, totals, tokens: int, row_scale) -> list[list[fx.Float32]]:
    """The epilogue of 16 tokens: four rows a lane, of one tile of results or of two."""
    values = []
    for tile in range(maps.TILES):
        total, scales = totals[tile * shape.token_tiles + tokens], unit.scales(tile)
        values.append([fx.Float32(fx.Int32(total[i])) * row_scale * scales[i] for i in range(4)])
    return [[silu(gate) * up for gate, up in zip(*values, strict=True)]] if shape.gated else values


def product_launcher(shape: ProductShape):
    """The product as a function of tensors and a stream, compiled at its first call.

    words, multipliers, scale: of a `WaveMatrix` (words as multipliers, where there are none). x: [T, K] int8 as int32
    words; x_scale [T] float32. pair_row [P] int32: of a gated product the row of x of every pair, else unused: row p.
    order, block_expert: of blocks of `shape.tokens` pairs; blocks of experts outside 0..experts - 1 are left out.
    out: [P, rows] float32.
    """

    @flyc.kernel
    def expert_product(
        words: fx.Tensor, multipliers: fx.Tensor, scale: fx.Tensor, x: fx.Tensor, x_scale: fx.Tensor,
        pair_row: fx.Tensor, order: fx.Tensor, block_expert: fx.Tensor, out: fx.Tensor,
        pairs: fx.Int32, experts: fx.Int32, x_bytes: fx.Int64,
    ):  # fmt: skip
        thread = fx.thread_idx.x
        lane = thread % fx.Int32(maps.WAVE)
        wave = fx.Int32(rocdl.readfirstlane(ir.IntegerType.get_signless(32), thread // fx.Int32(maps.WAVE)))
        number = fx.block_idx.x * fx.Int32(WAVES) + wave if shape.split == 1 else fx.block_idx.x
        expert = load_word(block_expert, fx.block_idx.y)
        known = (expert >= fx.Int32(0)) & (expert < experts)  # else the block is not used
        block = Block(shape, x, pair_row, order, pairs, x_bytes, thread, fx.block_idx.y)
        unit = Unit(shape, words, multipliers, scale, expert, known, number, wave, lane)
        bodies = known.select(fx.Int32(shape.bodies), fx.Int32(0))
        init = _first_state(shape, unit, block).values()
        for body, carried in range(0, bodies, 1, init=init):
            state = _State(shape, carried)
            _run_body(shape, unit, block, state, fx.Int32(body))
            results = yield state.values()
        totals = block.summed(as_vectors(results[: maps.TILES * shape.token_tiles]))
        for tokens in range_constexpr(shape.token_tiles):
            pair, used = block.pair(fx.Int32(tokens * maps.ROWS) + maps.lane_row(lane) % fx.Int32(shape.height))
            used = used & known & block.writes(lane, wave)
            kept = used.select(pair, fx.Int32(0))
            row_scale = fx.Float32(fx.ptr_load(fx.get_iter(x_scale) + block.source(kept)))
            values = _results(shape, unit, totals, tokens, row_scale)
            for tile in range_constexpr(len(values)):
                row = (number * fx.Int32(len(values)) + fx.Int32(tile)) * fx.Int32(maps.ROWS) + maps.result_row(lane, 0)
                at = fx.get_iter(out) + (fx.Int64(kept) * fx.Int64(shape.rows) + fx.Int64(row))
                if used & (row < fx.Int32(shape.rows)):
                    fx.ptr_store(Vector.from_elements(values[tile], fx.Float32), at)

    @flyc.jit
    def launch(
        words: fx.Tensor, multipliers: fx.Tensor, scale: fx.Tensor, x: fx.Tensor, x_scale: fx.Tensor,
        pair_row: fx.Tensor, order: fx.Tensor, block_expert: fx.Tensor, out: fx.Tensor,
        pairs: fx.Int32, experts: fx.Int32, x_bytes: fx.Int64, blocks: fx.Int32, stream: fx.Stream = fx.Stream(None),
    ):  # fmt: skip
        grid = (shape.programs, blocks, 1)
        expert_product(
            words, multipliers, scale, x, x_scale, pair_row, order, block_expert, out, pairs, experts, x_bytes
        ).launch(grid=grid, block=(THREADS, 1, 1), smem=shape.lds_bytes, stream=stream)  # fmt: skip

    return launch


__all__ = ["product_launcher"]
