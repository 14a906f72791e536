"""Which tile an INT8 or INT4 linear runs with, by GPU, shape and number of rows: data that the tuner writes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocol import Int4Weight, Int8Weight, IntegerWeight
from .tiles import Regime, regimes_of, tables_of, tile_for

LINEAR_NAMES: dict[type[IntegerWeight], str] = {Int4Weight: "int4", Int8Weight: "int8"}
_COUNTERS, _LINE = 1 << 16, 32


@dataclass(frozen=True)
class LinearTile:
    """rows: of weights, and tokens, that a program multiplies; columns: of K at a step. parts: of K, a program each.
    warps: of one program. stages: of the software pipeline. unpacked: whether INT4 is first unpacked in memory, 1 or 0.
    """

    rows: int
    tokens: int
    columns: int
    parts: int
    warps: int
    stages: int
    unpacked: int = 0


class LinearTable:
    """The regimes of one GPU, by kind of weight and its shape."""

    def __init__(self, regimes: dict[tuple[type[IntegerWeight], int, int], tuple[Regime[LinearTile], ...]]) -> None:
        self._regimes = regimes

    @staticmethod
    def of(gpu: str) -> LinearTable:
        """Of a GPU by its name or architecture, as `TileTable.of`."""
        return LinearTable.parse(tables_of(gpu))

    @staticmethod
    def parse(tables: dict[str, list[list[int]]]) -> LinearTable:
        """From rows of [most, rows, tokens, columns, parts, warps, stages, unpacked] by "int4.linear.NxK"; other names
        are left out."""
        kinds = {name: kind for kind, name in LINEAR_NAMES.items()}
        regimes = {}
        for name, rows in tables.items():
            kind, product, *shape = name.split(".")
            if product == "linear":
                outputs, inner = map(int, shape[0].split("x"))
                regimes[kinds[kind], outputs, inner] = regimes_of(rows, LinearTile)
        return LinearTable(regimes)

    def tile(self, kind: type[IntegerWeight], outputs: int, inner: int, tokens: int) -> LinearTile:
        """Of a weight [outputs, inner] and so many rows. An unknown shape has the regimes of the one nearest in size,
        and of these nearest in outputs."""
        known = self._regimes.get((kind, outputs, inner)) or self._regimes[self._nearest(kind, outputs, inner)]
        return tile_for(known, tokens)

    def _nearest(self, kind: type[IntegerWeight], outputs: int, inner: int) -> tuple[type[IntegerWeight], int, int]:
        def distance(known: tuple[type[IntegerWeight], int, int]) -> tuple[float, float]:
            size = math.log(known[1] * known[2] / (outputs * inner))
            return abs(size), abs(math.log(known[1] / outputs))

        return min((known for known in self._regimes if known[0] is kind), key=distance)


class Arrivals:
    """Zeros in which programs count who has arrived. Whoever takes some leaves them at zero.

    They are given out in turns, so that launches that run at the same time, as branches of one graph do, have each
    their own: there are enough for the launches of several layers.
    """

    def __init__(self, device: torch.device) -> None:
        self._zeros = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self._next = 0

    def take(self, count: int) -> Tensor:
        """Raises ValueError for more than there are."""
        if count > _COUNTERS:
            raise ValueError(f"{count} tiles of one product in parts of K, at most {_COUNTERS}: its tile has parts 1")
        first = self._next if self._next + count <= _COUNTERS else 0
        # Each launch's begin in a cache line of their own: an address that is a multiple of 16 is another kernel.
        self._next = first + -(-count // _LINE) * _LINE
        return self._zeros[first : first + count]


@dataclass(frozen=True)
class LinearTuning:
    """What fits a GPU; no bit depends on it. table: of its integer products. amd: whether it is one of AMD's."""

    table: LinearTable
    arrivals: Arrivals
    amd: bool

    @property
    def releases(self) -> int:
        """Threads of a warp that each release what they stored; 0 where a barrier orders the stores of all
        (`integer_products`)."""
        return 64 if self.amd else 0

    @property
    def programs(self) -> int:
        """Of a float product: below so many K is cut, about two a multiprocessor."""
        return 512 if self.amd else 264


def linear_tuning(gpu: str, device: torch.device) -> LinearTuning:
    """gpu: as in the table of tiles."""
    return LinearTuning(LinearTable.of(gpu), Arrivals(device), gpu.startswith("gfx"))


__all__ = ["LINEAR_NAMES", "LinearTable", "LinearTile", "LinearTuning", "linear_tuning"]
