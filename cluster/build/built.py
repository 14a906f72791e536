"""What came out for one kernel, and whether it may run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ...kernels.flydsl.isa import LDS_BYTES, Isa
from ..figures import Figure

_SIMDS = 4
"""Of a compute unit."""


@dataclass(frozen=True)
class Built:
    """name: of the kernel with what it is specialized to; source: whose it is, such as "triton". family: kernels that
    stand in one line of the table. lds: bytes of a program of `warps` waves. instruction: a pattern that one of its
    instructions must match, empty where none must. weight_bits: of one weight with all that belongs to it, of a product
    with `tokens` tokens at once; 0 of other kernels. clocks: of one run of the loop by LLVM's model, if it is here.
    """

    name: str
    source: str
    family: str
    isa: Isa
    lds: int
    warps: int
    matrix: str
    instruction: str
    weight_bits: float = 0.0
    tokens: int = 0
    clocks: float | None = None

    @property
    def waves(self) -> int:
        """That are on one SIMD at once, by registers and LDS."""
        programs = LDS_BYTES // self.lds if self.lds else self.isa.waves * _SIMDS
        return min(self.isa.waves, max(programs * self.warps // _SIMDS, 1 if programs else 0))

    @property
    def bytes_a_flop(self) -> float:
        """Bytes of weights read for an operation of a product."""
        return self.weight_bits / 16 / self.tokens if self.tokens else 0.0

    @property
    def faults(self) -> tuple[str, ...]:
        """Why it should not run."""
        return tuple(self._faults())

    def _faults(self) -> Iterator[str]:
        if self.isa.spills:
            yield f"spills {self.isa.spills} registers"
        if self.isa.scratch:
            yield f"needs {self.isa.scratch} bytes of scratch"
        if self.lds > LDS_BYTES:
            yield f"needs {self.lds} bytes of LDS, there are {LDS_BYTES}"
        if self.instruction and not re.search(self.instruction, self.matrix):
            yield f"has no {self.instruction}, but {self.matrix or 'no matrix instruction'}"

    def figures(self) -> Iterator[Figure]:
        """Named for instance spills.KERNEL."""
        isa = self.isa
        counts = {"vgpr": isa.vgpr, "sgpr": isa.sgpr, "spills": isa.spills, "parked": isa.parked, "waves": self.waves}
        for what, value in counts.items():
            yield Figure(f"{what}.{self.name}", value, "1")
        yield Figure(f"lds.{self.name}", self.lds, "bytes")
        yield Figure(f"scratch.{self.name}", isa.scratch, "bytes")
        if self.tokens:
            yield Figure(f"bytes_flop.{self.name}", self.bytes_a_flop, "bytes/FLOP")
        if self.clocks is not None:
            yield Figure(f"clocks.{self.name}", self.clocks, "clocks")


@dataclass(frozen=True)
class NotBuilt:
    """A kernel that does not compile, and what the compiler said."""

    name: str
    source: str
    faults: tuple[str, ...]
