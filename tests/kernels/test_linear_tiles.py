"""The table of tiles for linears: which one a shape gets, what the tuner would try, and counters that no two share."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton.backends")

from flyray.kernels.protocol import Int4Weight, Int8Weight
from flyray.kernels.triton.linear_tiles import LINEAR_NAMES, Arrivals, LinearTable, LinearTile
from flyray.kernels.triton.linear_tuner import HEAD, SHAPES, candidates, cases
from flyray.kernels.triton.tiles import table_text, tables_of, tile_row

FEW, MANY, OTHER = (
    LinearTile(64, 16, 256, 4, 4, 3),
    LinearTile(128, 256, 128, 1, 8, 4, 1),
    LinearTile(32, 16, 256, 1, 2, 4),
)


def test_a_shape_gets_its_own_regime_or_that_of_the_nearest_size() -> None:
    written = {
        "a gpu": {
            "int4.gate_up": [[1, 8, 3, 4, 0]],
            "int4.linear.1000x500": [tile_row(2048, MANY), tile_row(16, FEW)],
            "int4.linear.10000x500": [tile_row(16, OTHER)],
            "int4.linear.500x10000": [tile_row(16, FEW)],
            "int8.linear.1000x500": [tile_row(16, OTHER)],
        }
    }
    table = LinearTable.parse(json.loads(table_text(written))["a gpu"])
    assert [table.tile(Int4Weight, 1000, 500, rows) for rows in (1, 16, 17, 9999)] == [FEW, FEW, MANY, MANY]
    assert table.tile(Int4Weight, 100, 400, 1) == FEW
    assert table.tile(Int4Weight, 9000, 600, 1) == OTHER, "as many outputs"
    assert table.tile(Int4Weight, 600, 9000, 1) == FEW
    assert table.tile(Int8Weight, 1000, 500, 1) == OTHER


@pytest.mark.parametrize("gpu", ["default", "NVIDIA H200", "gfx942"])
def test_every_linear_of_kimi_has_tiles_that_can_be(gpu: str) -> None:
    tables = tables_of(gpu)
    for kind, name in LINEAR_NAMES.items():
        for outputs, inner in SHAPES if kind is Int4Weight else (*SHAPES, HEAD):
            rows = tables[f"{name}.linear.{outputs}x{inner}"]
            assert [most for most, *_ in rows] == sorted({most for most, *_ in rows})
            for tile in (LinearTile(*tile) for _, *tile in rows):
                assert {tile.rows, tile.tokens, tile.columns} <= {8, 16, 32, 64, 128, 256, 512}
                assert tile.parts <= -(-inner // tile.columns), "no part is empty"
                assert not tile.unpacked or kind is Int4Weight


@pytest.mark.parametrize("amd", [False, True])
def test_the_tuner_tries_several_tiles_of_every_case(amd: bool) -> None:
    for case in (case for kind in LINEAR_NAMES for case in cases(kind)):
        tiles = candidates(case, amd)
        assert 1 < len(tiles) == len(set(tiles)) < 80, case
        assert all(tile.parts <= -(-case.inner // tile.columns) for tile in tiles)
        assert not amd or all(tile.tokens * tile.columns <= 16384 for tile in tiles)


def test_launches_in_a_row_count_in_places_of_their_own() -> None:
    arrivals = Arrivals(torch.device("cpu"))
    taken = [arrivals.take(count) for count in (5, 600, 32)]
    for number, counters in enumerate(taken):
        counters += number + 1
    assert [set(counters.tolist()) for counters in taken] == [{1}, {2}, {3}]
    assert all(counters.data_ptr() % 16 == 0 for counters in taken)
    assert len(arrivals.take(1 << 16)) == 1 << 16, "from the first one on"
    with pytest.raises(ValueError, match=r"100000 tiles of one product in parts of K, at most 65536"):
        arrivals.take(100000)
