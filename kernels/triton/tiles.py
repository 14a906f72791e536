"""Which tile a product runs with, by GPU, kind of matrix and number of rows an expert: data that the tuner writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from ..protocol import Bf16Matrix, ExpertMatrix, Fp8Matrix, Int4Matrix, Int8Matrix

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KIND_NAMES: dict[type[ExpertMatrix], str] = {
    Int4Matrix: "int4",
    Int8Matrix: "int8",
    Fp8Matrix: "fp8",
    Bf16Matrix: "bf16",
}


@dataclass(frozen=True)
class Tile:
    """rows: activations a program multiplies with 128 rows of weights. stages: of the software pipeline. warps: of one
    program. registers: the most that a thread may use, 0 for no bound (CUDA alone)."""

    rows: int
    stages: int
    warps: int
    registers: int = 0


T = TypeVar("T")


@dataclass(frozen=True)
class Regime(Generic[T]):
    """tile runs while there are at most `most` rows: an experts' product's pairs in all, a linear's tokens."""

    most: int
    tile: T


def regimes_of(rows: Iterable[list[int]], tile: Callable[..., T]) -> tuple[Regime[T], ...]:
    """From rows of [most, *the tile's fields], in any order."""
    return tuple(Regime(most, tile(*fields)) for most, *fields in sorted(rows))


def tile_for(regimes: Sequence[Regime[T]], rows: int) -> T:
    """That of the first regime that holds so many rows, else of the last."""
    return next((regime.tile for regime in regimes if rows <= regime.most), regimes[-1].tile)


class TileTable:
    """The regimes of one GPU: of a kind's gate-and-up and down products, by pairs. amd: whether it is one of AMD's."""

    def __init__(self, regimes: dict[str, tuple[Regime[Tile], ...]], amd: bool = False) -> None:
        self._regimes, self.amd = regimes, amd

    @staticmethod
    def of(gpu: str) -> TileTable:
        """Of a GPU by its name or architecture, as `tables_of`."""
        return TileTable.parse(tables_of(gpu), gpu.startswith("gfx"))

    @staticmethod
    def parse(tables: dict[str, list[list[int]]], amd: bool = False) -> TileTable:
        """From rows of [pairs, rows, stages, warps, registers] by "int4.gate_up" and so on; names of linears are left
        out."""
        products = {name: rows for name, rows in tables.items() if name.endswith((".gate_up", ".down"))}
        return TileTable({name: regimes_of(rows, Tile) for name, rows in products.items()}, amd)

    def tile(self, kind: type[ExpertMatrix], gated: bool, pairs: int) -> Tile:
        """For so many pairs."""
        return tile_for(self._regimes[f"{KIND_NAMES[kind]}.{'gate_up' if gated else 'down'}"], pairs)

    def names(self) -> tuple[str, ...]:
        return tuple(self._regimes)


def tables_of(gpu: str) -> dict[str, list[list[int]]]:
    """What is known of a GPU by its name or architecture. What nobody tuned there, AMD's have from gfx942, whose tiles
    fit their LDS and bound no registers, others from "default"."""
    known = json.loads(Path(__file__).with_name("tiles.json").read_text())
    return known["gfx942" if gpu.startswith("gfx") else "default"] | known.get(gpu, {})


def tile_row(most: int, tile: DataclassInstance) -> list[int]:
    """What `TileTable.parse` and `LinearTable.parse` read."""
    return [most, *map(int, asdict(tile).values())]


def table_text(tables: dict[str, dict[str, list[list[int]]]]) -> str:
    """The tables of all GPUs as JSON, a line for each product."""
    blocks = []
    for gpu, regimes in tables.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(rows)}" for name, rows in regimes.items()]
        blocks.append(f"  {json.dumps(gpu)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def row_order(amd: bool) -> dict[str, int]:
    """Options of the compiler that a product of floats needs so that a row's bits do not depend on how many rows there
    are. AMD's takes one matrix instruction or another by the rows of a tile, 32 x 32 or 16 x 16, and these need not add
    in the same order; so one is named. NVIDIA's has one order."""
    return {"matrix_instr_nonkdim": 16} if amd else {}


def gpu_name(device: torch.device) -> str:
    """The key of a device in the table, such as "NVIDIA H200" or "gfx942"."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return torch.cuda.get_device_name(device)


__all__ = [
    "KIND_NAMES",
    "Regime",
    "Tile",
    "TileTable",
    "gpu_name",
    "regimes_of",
    "row_order",
    "table_text",
    "tables_of",
    "tile_for",
    "tile_row",
]
