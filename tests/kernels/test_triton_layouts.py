"""The GPU's tiles of expert weights hold every value where their docstrings say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from kernel_cases import MATRIX_KINDS, expert_weights

from flyray.kernels.protocol import ExpertMatrix, Int4Matrix
from flyray.kernels.triton.layouts import TiledMatrix, tile_columns, tile_experts
from flyray.kernels.triton.tiles import Regime, Tile, TileTable, table_text, tile_row


def row_place(row: int, rows: int, gated: bool) -> int:
    """Where a row of the matrix stands among the tiles' rows."""
    if not gated:
        return row
    up, inside = divmod(row, rows // 2)
    return inside // 8 * 16 + 8 * up + inside % 8


def unpacked(tiled: TiledMatrix, expert: int, row: int) -> np.ndarray:
    """One row's bytes, or INT4 values and multipliers as [2, K], read tile by tile."""
    tile, inside = divmod(row, 128)
    data = tiled.tiles[expert, tile, :, inside].numpy()
    if tiled.kind is not Int4Matrix:
        return data.reshape(-1)
    assert tiled.multipliers is not None
    factors = tiled.multipliers[expert, tile, :, inside].numpy()
    values = np.concatenate([data & 15, data >> 4], axis=1).reshape(-1)
    groups = np.concatenate([factors & 15, factors >> 4], axis=1).reshape(-1)
    return np.stack([values, groups.repeat(32)])


@pytest.mark.parametrize("kind", MATRIX_KINDS)
@pytest.mark.parametrize(("hidden", "inner"), [(288, 160), (256, 64), (320, 96)])
def test_every_value_is_in_its_place(kind: type[ExpertMatrix], hidden: int, inner: int) -> None:
    weights = expert_weights(kind, 11, hidden, inner)
    tiled = tile_experts(weights)
    for matrix, tiles, gated in ((weights.gate_up, tiled.gate_up, True), (weights.down, tiled.down, False)):
        assert (tiles.experts, tiles.inner) == (11, hidden if gated else inner)
        for row in (0, 7, 8, tiles.rows // 2 - 1, tiles.rows // 2, tiles.rows - 1):
            place = row_place(row, tiles.rows, gated)
            found = unpacked(tiles, 10, place)
            if isinstance(matrix, Int4Matrix):
                bytes_ = matrix.nibbles[10, row].numpy().reshape(-1, 16)
                values = np.concatenate([bytes_ & 15, bytes_ >> 4], axis=1).reshape(-1)
                assert np.array_equal(found[0, : tiles.inner], values)
                assert np.array_equal(found[1, : tiles.inner], matrix.multipliers[10, row].numpy().repeat(32))
                assert (found[0, tiles.inner :] == 8).all(), "no value beyond K"
            else:
                values = matrix.values[10, row].view(torch.uint8).numpy()
                assert np.array_equal(found[: values.size], values)
                assert not found[values.size :].any()
            if tiles.scale is not None and hasattr(matrix, "scale"):
                assert tiles.scale[10, place] == matrix.scale[10, row]
        assert tiles.tiles.shape[2] == -(-tiles.inner // tile_columns(kind))


def test_a_table_gives_the_first_regime_that_holds_the_pairs() -> None:
    few, many = Tile(8, 3, 4), Tile(64, 2, 8, 128)
    table = TileTable({"int4.gate_up": (Regime(64, few), Regime(512, many))})
    assert [table.tile(Int4Matrix, True, pairs) for pairs in (1, 64, 65, 9999)] == [few, few, many, many]
    written = {"a gpu": {"int4.gate_up": [tile_row(512, many), tile_row(64, few)]}}
    read = TileTable.parse(json.loads(table_text(written))["a gpu"])
    assert read.tile(Int4Matrix, True, 64) == few
    assert read.tile(Int4Matrix, True, 65) == many


def test_every_gpu_has_a_tile_for_every_product() -> None:
    for gpu in ("NVIDIA H200", "gfx942", "a GPU that nobody tuned"):
        for kind in MATRIX_KINDS:
            for gated in (True, False):
                assert TileTable.of(gpu).tile(kind, gated, 100).rows in (8, 16, 32, 64, 128)
