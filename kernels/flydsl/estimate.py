"""How long an MI325X would take for Kimi-K2.5's experts, computed from compiled code and published rates; never run.

    python -m flyray.kernels.flydsl.estimate gfx942

Each product takes at least as long as its longest part: reading its weights once, or issuing its instructions, spread
over as many SIMDs as its programs reach. What lies before and after the loops, launches, and what the parts wait for
each other are not in it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from math import ceil, exp, lgamma, log, log1p

from ..protocol import Int4Matrix, Int8Matrix
from .build import build, products
from .experts import block_size
from .isa import Isa
from .shape import WAVES, ProductShape
from .wave_maps import TILES

COMPUTE_UNITS, SIMDS, HERTZ, BYTES_A_SECOND = 304, 4, 2.1e9, 6e12
"""Of an MI325X, as AMD publishes them."""
_VECTOR, _MATRIX, _LDS = 4, 16, 8
"""Clocks of a vector instruction, of `v_mfma_i32_16x16x32_i8` (4 passes), and of 1 KiB to or from LDS."""
EXPERTS, TOP_K = 384, 8
BITS = {4: 4.125, 8: 8.0}
"""In memory, of a weight of so many bits."""


@dataclass(frozen=True)
class Times:
    """Microseconds of one product: to read its weights, to issue its vector and matrix instructions, to have the
    matrix unit work, and to move its activations through LDS."""

    bytes: float
    issue: float
    matrix: float
    lds: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("bytes", "issue", "matrix", "lds"), key=lambda name: getattr(self, name))

    @property
    def longest(self) -> float:
        return getattr(self, self.bound)


def routed(tokens: int, experts: int, size: int) -> tuple[float, float]:
    """Of so many experts on a GPU how many get pairs from uniform routing, and the blocks of `size` pairs they fill."""
    share = TOP_K / EXPERTS
    least = max(0, int(tokens * share - 12 * (tokens * share) ** 0.5) - 12)
    most = min(tokens, int(tokens * share + 12 * (tokens * share) ** 0.5) + 12)
    blocks = 0.0
    for n in range(least, most + 1):
        ways = lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
        blocks += exp(ways + n * log(share) + (tokens - n) * log1p(-share)) * ceil(n / size)
    return experts * (1 - (1 - share) ** tokens), experts * blocks


def times(shape: ProductShape, isa: Isa, tokens: int, experts: int) -> Times:
    """Of one product for so many tokens, on a GPU with so many of the experts."""
    distinct, blocks = routed(tokens, experts, shape.tokens)
    steps = 4 if shape.bits == 4 else 2
    runs = shape.bodies * TILES * shape.ahead * steps * shape.token_tiles / isa.matrix  # an unrolled loop is one run
    waves = blocks * shape.programs * WAVES
    turns = max(waves / (COMPUTE_UNITS * SIMDS), 1.0) * runs  # with few programs one wave is the longest
    moved = sum(count for name, count in isa.loop.items() if name in ("ds_read_b128", "ds_write_b128"))
    clock = 1e6 / HERTZ
    rows = shape.rows * (2 if shape.gated else 1)
    return Times(
        distinct * rows * shape.inner * BITS[shape.bits] / 8 / BYTES_A_SECOND * 1e6,
        turns * (_VECTOR * isa.vector + _VECTOR * isa.matrix) * clock,
        turns * _MATRIX * isa.matrix * clock,
        turns * SIMDS * _LDS * moved * clock,
    )


def main(target: str) -> None:
    """Prints a line for each format, number of GPUs and of tokens."""
    print("bits  GPUs  tokens  block  | gate and up: bytes  issue  matrix  LDS, µs  bound | down: the same")
    for kind in (Int4Matrix, Int8Matrix):
        shapes = products(7168, 2048, (kind,))
        built = {shape: build(shape, target) for shape in shapes}
        for gpus, tokens in [(1, 1), (1, 8), (1, 64), (1, 256), (1, 2048), (1, 16384), (8, 1), (8, 8), (8, 64)]:
            experts = EXPERTS // gpus
            size = block_size(tokens * TOP_K, experts)
            line = [f"{shapes[0].bits}  {gpus}  {tokens}  {size}"]
            for shape in shapes:
                if shape.tokens == size:
                    found = times(shape, built[shape], tokens, experts)
                    parts = "  ".join(f"{part:.1f}" for part in (found.bytes, found.issue, found.matrix, found.lds))
                    line.append(f"{parts}  {found.bound}")
            print(" | ".join(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
