"""Times tiles of INT8 and INT4 linears on this GPU; `tuner` writes the fastest into the table.

Every candidate gives the same bits, so the table is a matter of time alone. A tile is timed by replaying a graph that
multiplies as many copies of a weight, one after the other, as no cache holds. All that will be launched is compiled
before, by all cores at once: what a process compiled, Triton finds on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from time import perf_counter

import torch
from triton.runtime.errors import OutOfResources

from ..protocol import ActivationFormat, Activations, Int4Weight, Int8Weight, IntegerWeight
from .linear import integer_linear
from .linear_tiles import LINEAR_NAMES, Arrivals, LinearTable, LinearTile, LinearTuning, linear_tuning
from .recording import Launch, compile_launch, record
from .tiles import Regime, tile_row
from .timing import graph_time

SHAPES = (
    (2112, 7168), (12288, 1536), (7168, 8192), (4096, 7168), (7168, 2048), (36864, 7168), (7168, 18432),
)  # fmt: skip
"""[N, K] of Kimi-K2.5's: attention's down, query and output, shared gate and up, and down, and the dense layer's."""
HEAD = (163840, 7168)
"""Of INT8 alone, and for the rows that need logits."""
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
HEAD_TOKENS = (1, 8, 16, 32, 64, 128, 256)
_CACHED_BYTES = 160 << 20
_PROGRAMS = range(96, 700)
"""Between the fewest that keep a GPU's memory busy and the most that pay for adding their parts."""


@dataclass(frozen=True)
class LinearCase:
    """A product of `tokens` rows with a weight [outputs, inner]."""

    kind: type[IntegerWeight]
    outputs: int
    inner: int
    tokens: int

    @property
    def name(self) -> str:
        """Of its regimes in a table."""
        return f"{LINEAR_NAMES[self.kind]}.linear.{self.outputs}x{self.inner}"

    @property
    def weight_bytes(self) -> int:
        return self.outputs * self.inner * (17 if self.kind is Int4Weight else 32) // 32

    @property
    def bytes(self) -> int:
        """That it must read and write."""
        return self.weight_bytes + self.tokens * (self.inner + 4 * self.outputs)

    @property
    def operations(self) -> int:
        return 2 * self.tokens * self.outputs * self.inner


def cases(kind: type[IntegerWeight]) -> list[LinearCase]:
    """All that Kimi-K2.5 multiplies in this kind."""
    found = [LinearCase(kind, *shape, tokens) for shape in SHAPES for tokens in TOKENS]
    head = [LinearCase(kind, *HEAD, tokens) for tokens in HEAD_TOKENS] if kind is Int8Weight else []
    return found + head


def candidates(case: LinearCase, amd: bool) -> list[LinearTile]:
    """Tiles worth a try. amd: those that fit 64 KiB, in two stages."""
    found: dict[LinearTile, None] = {}
    for rows, size, columns, warps, stages, unpacked in _AMD_FORMS if amd else _forms(case):
        tiles = -(-case.outputs // rows) * -(-case.tokens // size)
        depth = -(-case.inner // columns)
        fits = size >= min(case.tokens, 256) // 2 and size <= max(16, 2 * case.tokens)
        if fits and (not unpacked or case.kind is Int4Weight):
            for parts in _parts(tiles, depth):
                found[LinearTile(rows, size, columns, parts, warps, stages, unpacked)] = None
    return list(found)


def _parts(tiles: int, depth: int) -> Iterator[int]:
    """Numbers of parts, as evenly as K can be cut, that give a GPU enough programs."""
    yield 1
    for parts in (2, 4, 8, 16):
        even = -(-depth // -(-depth // parts))
        if depth >= 2 * parts and tiles * even in _PROGRAMS:
            yield even


def _forms(case: LinearCase) -> Iterator[tuple[int, int, int, int, int, int]]:
    """rows, tokens, columns, warps, stages, unpacked. An INT8 tile has twice the bytes of an INT4 one."""
    int8 = case.kind is Int8Weight
    if case.tokens <= 32:
        for size in (8, 16, 32):
            for rows, warps in ((32, 2), (64, 4), (128, 4)):
                yield rows, size, 256, warps, 3, 0
                yield rows, size, 256, warps, 5, 0
            yield 64, size, 128 if int8 else 512, 4, 5 if int8 else 3, 0
    elif case.tokens <= 256:
        for size in (64, 128, 256):
            yield 64, size, 128, 4, 3, 0
            yield 128, size, 128, 8, 3, 0
            if size <= 128:
                yield 64, size, 256, 4, 2, 0
                yield 64, size, 256, 4, 3, 0
                yield 128, size, 256, 8, 3, 0
    else:
        unpackings = (0, 1) if case.tokens <= 2048 else (1,)
        for unpacked in (0,) if int8 else unpackings:
            yield 128, 256, 128, 8, 3, unpacked
            yield 128, 256, 128, 8, 4, unpacked
            yield 128, 128, 128, 8, 3, unpacked
            yield 64, 256, 128, 4, 2, unpacked
            yield 128, 128, 256, 8, 2, unpacked


_AMD_FORMS = (
    (32, 16, 256, 2, 2, 0), (64, 16, 256, 4, 2, 0), (128, 16, 256, 4, 2, 0), (64, 32, 256, 4, 2, 0),
    (64, 64, 128, 4, 2, 0), (128, 64, 128, 4, 2, 0), (64, 128, 128, 4, 2, 0), (128, 128, 128, 8, 2, 0),
    (128, 128, 128, 4, 2, 0), (128, 128, 128, 8, 2, 1), (128, 128, 128, 4, 2, 1),
)  # fmt: skip


def best_linear_tiles(
    some: Sequence[LinearCase], gpu: str, device: torch.device, bandwidth: float
) -> dict[str, list[list[int]]]:
    """The rows of `LinearTable.parse` by their names; prints every time. bandwidth: bytes a second that the GPU reads,
    of which a share is printed."""
    tuning = linear_tuning(gpu, device)
    _compile([(case, candidates(case, tuning.amd)) for case in some], tuning, _architecture(gpu, device))
    table: dict[str, list[list[int]]] = {}
    for case in some:
        times = dict(_times(case, candidates(case, tuning.amd), tuning, device))
        best = min(times, key=lambda tile: times[tile])
        shown = " ".join(f"{_words(tile)}:{us:.1f}" for tile, us in sorted(times.items(), key=lambda item: item[1]))
        share, rate = case.bytes / times[best] / bandwidth * 1e6, case.operations / times[best] / 1e6
        print(f"{case.name} {case.tokens} rows: {share:.0%} of the bandwidth, {rate:.0f} TOPS: {shown}", flush=True)
        rows = table.setdefault(case.name, [])
        if rows and rows[-1][1:] == tile_row(0, best)[1:]:
            rows.pop()  # one regime then holds both numbers of rows
        rows.append(tile_row(case.tokens, best))
    return table


def _times(
    case: LinearCase, tiles: Iterable[LinearTile], tuning: LinearTuning, device: torch.device
) -> Iterator[tuple[LinearTile, float]]:
    """µs of each tile that fits the GPU. Raises RuntimeError where two do not give the same bits."""
    copies = max(1, min(48, _CACHED_BYTES // case.weight_bytes))
    weights, x = _weights(case, copies, device), _rows(case, device)
    expected: torch.Tensor | None = None
    for tile in tiles:
        one = _only(case, tile, tuning)

        def run(tuning: LinearTuning = one) -> None:
            for weight in weights:
                integer_linear(x, weight, tuning)

        try:
            yield tile, graph_time(run, repeats=5) / copies
        except OutOfResources as error:
            print(f"{case.name}: {_words(tile)} left out: {error}", flush=True)
            continue
        result = integer_linear(x, weights[0], one)
        if expected is not None and not torch.equal(result, expected):
            raise RuntimeError(f"{case.name}, {case.tokens} rows: {_words(tile)} gives other results than those before")
        expected = result


def _compile(some: Iterable[tuple[LinearCase, list[LinearTile]]], tuning: LinearTuning, target: str) -> None:
    begin, meta = perf_counter(), torch.device("meta")

    def launch_all() -> None:
        for case, tiles in some:
            for tile in tiles:
                integer_linear(_rows(case, meta), _weights(case, 1, meta)[0], _only(case, tile, tuning, meta))

    launches = record(launch_all, target)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for _ in pool.map(_compile_one, launches, [target] * len(launches)):
            pass
    print(f"{len(launches)} kernels compiled in {perf_counter() - begin:.0f} s", flush=True)


def _compile_one(launch: Launch, target: str) -> None:
    compile_launch(launch, target)


def _only(case: LinearCase, tile: LinearTile, tuning: LinearTuning, device: torch.device | None = None) -> LinearTuning:
    """What launches this tile, whatever the table says."""
    table = LinearTable({(case.kind, case.outputs, case.inner): (Regime(case.tokens, tile),)})
    arrivals = tuning.arrivals if device is None else Arrivals(device)
    return LinearTuning(table, arrivals, tuning.amd)


def _architecture(gpu: str, device: torch.device) -> str:
    """As `recording` names it."""
    major, minor = (0, 0) if gpu.startswith("gfx") else torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}" if major else gpu


def _rows(case: LinearCase, device: torch.device) -> Activations:
    values = torch.empty((case.tokens, case.inner), dtype=torch.int8, device=device)
    if device.type != "meta":
        values.random_(-127, 128)
    return Activations(ActivationFormat.INT8, values, torch.full((case.tokens,), 0.01, device=device))


def _weights(case: LinearCase, copies: int, device: torch.device) -> list[IntegerWeight]:
    """Random, of mean zero."""

    def integers(least: int, beyond: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty((copies, case.outputs, columns), dtype=dtype, device=device)
        return made if device.type == "meta" else made.random_(least, beyond)

    scale = torch.full((case.outputs,), 0.01, device=device)
    if case.kind is Int8Weight:
        return [Int8Weight(values, scale) for values in integers(-127, 128, case.inner, torch.int8)]
    nibbles, multipliers = (
        integers(0, 256, case.inner // 2, torch.uint8),
        integers(1, 16, case.inner // 32, torch.uint8),
    )
    return [Int4Weight(*each, scale) for each in zip(nibbles, multipliers, strict=True)]


def _words(tile: LinearTile) -> str:
    """Such as 64x16x256p4w4s3u."""
    return f"{tile.rows}x{tile.tokens}x{tile.columns}p{tile.parts}w{tile.warps}s{tile.stages}{'u' * tile.unpacked}"


__all__ = ["LinearCase", "best_linear_tiles", "candidates", "cases"]
