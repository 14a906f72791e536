"""Times tiles of the routed experts on this GPU and says which is fastest in each regime: `python -m …triton.tuner`,
which tunes linears too (`linear_tuner`).

Weights and routing are random: zero-mean codes, every token on `top_k` distinct experts, drawn evenly; a table is for
one shape of model. Each candidate is timed by replaying a graph of launches with several routings, so that small
batches find nothing in the cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..protocol import ActivationFormat, Activations, ExpertMatrix, Int4Matrix
from .experts import multiply
from .grouping import group_pairs
from .layouts import ROWS, TiledExperts, TiledMatrix, tile_columns
from .linear_tiles import LINEAR_NAMES
from .linear_tuner import best_linear_tiles, cases
from .tiles import KIND_NAMES, Tile, gpu_name, table_text, tile_row
from .timing import graph_time, read_bandwidth

CANDIDATES = (
    Tile(8, 3, 4), Tile(8, 4, 4), Tile(16, 3, 4), Tile(16, 4, 4), Tile(16, 3, 4, 128), Tile(32, 3, 4), Tile(32, 4, 4),
    Tile(64, 2, 4), Tile(64, 3, 4), Tile(64, 3, 8), Tile(128, 2, 8), Tile(128, 3, 8), Tile(128, 2, 4),
)  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer."""

    experts: int = 384
    hidden: int = 7168
    intermediate: int = 2048
    top_k: int = 8


@dataclass(frozen=True)
class Routing:
    """Pairs of one step: token [P] int32 and expert [P] int32, and how many distinct experts they name."""

    token: Tensor
    expert: Tensor
    distinct: int


def random_experts(kind: type[ExpertMatrix], shape: LayerShape, device: torch.device) -> TiledExperts:
    """Random tiles of a whole layer, made on the device: nibbles and integers of mean zero, small scales."""
    gate_up = _random_matrix(kind, shape.experts, 2 * shape.intermediate, shape.hidden, device)
    return TiledExperts(gate_up, _random_matrix(kind, shape.experts, shape.hidden, shape.intermediate, device))


def random_rows(kind: type[ExpertMatrix], rows: int, width: int, device: torch.device) -> Activations:
    """Rows of activations of the format that `kind` multiplies."""
    format = activation_format_of(kind)
    if format is ActivationFormat.FLOAT:
        return Activations(format, torch.randn(rows, width, device=device), None)
    values = torch.randint(-127, 128, (rows, width), device=device, dtype=torch.int8)
    if format is ActivationFormat.FP8:
        values = torch.randn(rows, width, device=device).to(torch.float8_e4m3fn)
    return Activations(format, values, torch.rand(rows, device=device) / 100)


def activation_format_of(kind: type[ExpertMatrix]) -> ActivationFormat:
    names = {"int4": ActivationFormat.INT8, "int8": ActivationFormat.INT8, "fp8": ActivationFormat.FP8}
    return names.get(KIND_NAMES[kind], ActivationFormat.FLOAT)


def random_routing(tokens: int, shape: LayerShape, seed: int, device: torch.device) -> Routing:
    """top_k distinct experts a token, evenly drawn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, shape.experts, generator=generator).argsort(dim=1)[:, : shape.top_k]
    token = torch.arange(tokens, dtype=torch.int32).repeat_interleave(shape.top_k)
    return Routing(token.to(device), ids.flatten().to(torch.int32).to(device), ids.unique().numel())


def routings(tokens: int, shape: LayerShape, device: torch.device) -> list[Routing]:
    """As many as keep the weights that they read out of the cache."""
    count = 8 if tokens <= 2 else 4 if tokens <= 8 else 1
    return [random_routing(tokens, shape, seed, device) for seed in range(count)]


def plausible(tiles: Iterable[Tile], pairs: int, experts: int) -> list[Tile]:
    """Tiles of a size near the pairs an expert."""
    each = max(1.0, pairs / experts)
    return [tile for tile in tiles if each / 8 <= tile.rows <= max(16.0, 2 * each)]


def best_tiles(
    kind: type[ExpertMatrix], shape: LayerShape, tokens: Iterable[int], tiles: Iterable[Tile], device: torch.device
) -> dict[str, list[list[int]]]:
    """The rows of `TileTable.parse` for one kind; prints every time."""
    layer, name = random_experts(kind, shape, device), KIND_NAMES[kind]
    table: dict[str, list[list[int]]] = {f"{name}.gate_up": [], f"{name}.down": []}
    for count in tokens:
        steps, pairs = routings(count, shape, device), count * shape.top_k
        times: dict[bool, dict[Tile, float]] = {}
        for gated, matrix in ((True, layer.gate_up), (False, layer.down)):
            x = random_rows(kind, count if gated else pairs, matrix.inner, device)
            some = plausible(tiles, pairs, shape.experts)
            times[gated] = {tile: _time(x, matrix, gated, steps, tile, shape.experts) for tile in some}
            shown = " ".join(f"{t.rows}x{t.stages}x{t.warps}r{t.registers}:{us:.1f}" for t, us in times[gated].items())
            product = "gate_up" if gated else "down"
            print(f"{name}.{product} {count} tokens, {steps[0].distinct} experts: {shown}", flush=True)
        for gated, tile in _fastest_pair(times).items():
            table[f"{name}.{'gate_up' if gated else 'down'}"].append(tile_row(pairs, tile))
    return table


def _fastest_pair(times: dict[bool, dict[Tile, float]]) -> dict[bool, Tile]:
    """The tiles of both products with equal rows, so that pairs are grouped once, and the least time together."""
    by_rows = [
        {gated: min((t for t in of if t.rows == rows), key=lambda t: of[t]) for gated, of in times.items()}
        for rows in {tile.rows for tile in times[True]}
    ]
    return min(by_rows, key=lambda pair: sum(times[gated][tile] for gated, tile in pair.items()))


def _time(x: Activations, matrix: TiledMatrix, gated: bool, steps: list[Routing], tile: Tile, experts: int) -> float:
    """µs of one product. The pairs are grouped beforehand, unless they are so few that each is a block."""
    ready = [(s, group_pairs(s.expert, experts, tile.rows) if s.expert.shape[0] > 8 else None) for s in steps]
    amd = gpu_name(x.values.device).startswith("gfx")

    def run() -> None:
        for step, blocks in ready:
            multiply(x, matrix, step.token if gated else None, blocks, step.expert, tile, amd)

    return graph_time(run) / len(steps)


def _random_matrix(kind: type[ExpertMatrix], experts: int, rows: int, inner: int, device: torch.device) -> TiledMatrix:
    height, depth = -(-rows // ROWS), -(-inner // tile_columns(kind))
    tiles = torch.randint(0, 256, (experts, height, depth, ROWS, 128), dtype=torch.uint8, device=device)
    if KIND_NAMES[kind] in ("bf16", "fp8"):  # no NaN, no infinity: magnitudes below 2
        tiles = tiles & (0xBF if KIND_NAMES[kind] == "fp8" else 0xBC)
    groups = None
    if kind is Int4Matrix:
        nibbles = torch.randint(1, 16, (2, experts, height, depth, ROWS, 4), dtype=torch.uint8, device=device)
        groups = nibbles[0] | (nibbles[1] << 4)
    scale = torch.rand(experts, height * ROWS, device=device) * 1e-4
    return TiledMatrix(kind, tiles, groups, scale, experts, rows, inner)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the tiles of this GPU beside those of others.")
    parser.add_argument("--kind", choices=KIND_NAMES.values(), action="append", required=True)
    parser.add_argument("--product", choices=("experts", "linears"), action="append", help="both if it is not given")
    parser.add_argument("--json", type=Path, required=True, help="the table to write into, such as tiles.json")
    arguments = parser.parse_args()
    device, products = torch.device("cuda"), arguments.product or ("experts", "linears")
    table = json.loads(arguments.json.read_text())
    mine = table.setdefault(gpu_name(device), {})
    if "linears" in products:
        some = [case for kind, name in LINEAR_NAMES.items() if name in arguments.kind for case in cases(kind)]
        mine.update(best_linear_tiles(some, gpu_name(device), device, read_bandwidth(device)))
    for kind in (kind for kind, name in KIND_NAMES.items() if name in arguments.kind and "experts" in products):
        mine.update(best_tiles(kind, LayerShape(), TOKENS, CANDIDATES, device))
    arguments.json.write_text(table_text(table))


if __name__ == "__main__":
    main()


__all__ = ["LayerShape", "best_tiles", "random_experts", "random_routing", "random_rows", "routings"]
