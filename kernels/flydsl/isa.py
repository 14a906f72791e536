"""What a compiled kernel is: its registers, memory, and the instructions of its main loop, read from its assembly."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

LDS_BYTES = 65536
_REGISTERS = 512
_GRANULE = 8
_MOST_WAVES = 8
_NUMBERS = re.compile(r"^\s*\.(\w+):\s+(\d+)\s*$", re.MULTILINE)
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH = re.compile(r"^\s+s_c?branch\w*\s+(\.L\w+)")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w+)")
_WAIT = re.compile(r"vmcnt\((\d+)\)")


@dataclass(frozen=True)
class Isa:
    """vgpr: registers of a lane, sgpr: of a wave. spills: of a lane's, to scratch; parked: of a wave's, to lanes of a
    vector register, which takes no memory. scratch, lds: bytes, without the LDS that a launch asks for. lines: the
    instructions of the loop with the most matrix instructions, without its branch back, or all of a kernel whose loop
    is unrolled. loop: how often each is in there."""

    vgpr: int
    sgpr: int
    spills: int
    parked: int
    scratch: int
    lds: int
    lines: tuple[str, ...]
    loop: Counter[str]

    @property
    def waves(self) -> int:
        """That fit one SIMD of gfx942 by their registers, at most 8."""
        granules = -(-self.vgpr // _GRANULE) * _GRANULE
        return min(_MOST_WAVES, _REGISTERS // max(granules, 1))

    @property
    def matrix(self) -> int:
        """Matrix instructions of the loop."""
        return _matrix(self.loop)

    @property
    def vector(self) -> int:
        """Vector instructions of the loop beside those."""
        return sum(count for name, count in self.loop.items() if name.startswith("v_")) - self.matrix

    @property
    def under_way(self) -> int:
        """Loads that are on their way whenever the loop waits for an older one, at the least; 0 where it waits for all
        or for none."""
        return min((int(found[1]) for line in self.lines if (found := _WAIT.search(line))), default=0)


def read_isa(text: str) -> Isa:
    """From the assembly with its metadata, of one kernel. Raises ValueError where a number is missing."""
    numbers = {name: int(value) for name, value in _NUMBERS.findall(text)}
    lines = _main_loop(text)
    try:
        return Isa(
            numbers["vgpr_count"] + numbers.get("agpr_count", 0),
            numbers["sgpr_count"],
            numbers["vgpr_spill_count"],
            numbers["sgpr_spill_count"],
            numbers["private_segment_fixed_size"],
            numbers["group_segment_fixed_size"],
            tuple(lines),
            _count(lines),
        )
    except KeyError as error:
        raise ValueError(f"the assembly's metadata has no {error}") from None


def _main_loop(text: str) -> list[str]:
    lines = [code for line in text.splitlines() if (code := line.split(";")[0].rstrip())]
    places = {match[1]: place for place, line in enumerate(lines) if (match := _LABEL.match(line))}
    best: list[str] = []
    for place, line in enumerate(lines):
        branch = _BRANCH.match(line)
        if branch is not None and places.get(branch[1], place) < place:
            found = [each for each in lines[places[branch[1]] : place] if _INSTRUCTION.match(each)]
            best = max(best, found, key=lambda each: _matrix(_count(each)))
    return best if _matrix(_count(best)) else [line for line in lines if _INSTRUCTION.match(line)]


def _count(lines: list[str]) -> Counter[str]:
    return Counter(match[1] for line in lines if (match := _INSTRUCTION.match(line)))


def _matrix(found: Counter[str]) -> int:
    return sum(count for name, count in found.items() if name.startswith("v_mfma"))
