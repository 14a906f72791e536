"""What a build shows: a line for every family of kernels, and what must not run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from rich.table import Table

from ..figures import Figure
from .built import Built, NotBuilt


def build_table(built: Iterable[Built | NotBuilt]) -> Table:
    """Of several kernels in a line, such as one for few and one for many rows, a range, or the worst."""
    table = Table(
        "kernel", "variants", "matrix instruction", "VGPR", "waves", "LDS", "spills", "parked", "scratch",
        "bytes/FLOP", "clocks", box=None,
    )  # fmt: skip
    families: dict[tuple[str, str], list[Built]] = {}
    for each in sorted(built, key=lambda each: (each.source, each.name)):
        if isinstance(each, Built):
            families.setdefault((each.source, each.family), []).append(each)
    for (source, family), kernels in families.items():
        matrix = ", ".join(dict.fromkeys(each.matrix.removeprefix("v_mfma_") for each in kernels if each.matrix))
        most = (max(map(number, kernels)) for number in (_spills, _parked, _scratch))
        table.add_row(
            f"{source} {family}",
            str(len(kernels)),
            matrix or "-",
            _span(kernels, lambda each: each.isa.vgpr),
            _span(kernels, lambda each: each.waves),
            _span(kernels, lambda each: each.lds),
            *map(str, most),
            _span([each for each in kernels if each.tokens], lambda each: each.bytes_a_flop),
            _span([each for each in kernels if each.clocks is not None], lambda each: each.clocks or 0.0),
        )
    return table


def faults(built: Iterable[Built | NotBuilt]) -> Iterator[str]:
    """A line for every kernel that must not run."""
    return (f"{each.name}: {', '.join(each.faults)}" for each in built if each.faults)


def build_figures(built: Sequence[Built | NotBuilt], compiled: int) -> list[Figure]:
    """All kernels' numbers, and how many kernels there are, were compiled, and must not run."""
    figures = [figure for each in built if isinstance(each, Built) for figure in each.figures()]
    counts = {"kernels": len(built), "compiled": compiled, "faults": sum(bool(each.faults) for each in built)}
    return [*(Figure(f"build.{name}", value, "1") for name, value in counts.items()), *figures]


def _spills(each: Built) -> int:
    return each.isa.spills


def _parked(each: Built) -> int:
    return each.isa.parked


def _scratch(each: Built) -> int:
    return each.isa.scratch


def _span(kernels: Sequence[Built], number: Callable[[Built], float]) -> str:
    found = sorted(map(number, kernels))
    if not found:
        return "-"
    texts = [f"{value:.2g}" if value < 1 and value else f"{value:,.0f}" for value in (found[0], found[-1])]
    return "–".join(dict.fromkeys(texts))
