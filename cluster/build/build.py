"""Compiles all that a task wants, without a GPU; what was compiled before is taken from the disk."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...kernels import flydsl
from ...kernels.flydsl.build import BuildError, compiled
from ...kernels.flydsl.cycles import loop_clocks
from ...kernels.flydsl.isa import read_isa
from ...kernels.flydsl.shape import WAVES, ProductShape
from ...kernels.triton.recording import Launch, compile_launch
from ..figures import replace_text
from .built import Built, NotBuilt
from .launches import BuildTask

CACHE = Path.home() / ".cache" / "flyray" / "build"
"""Assembly of FlyDSL's products; Triton keeps a cache of its own."""
_MATRIX = re.compile(r"\bv_mfma_\w+")
_INT8_MATRIX = "v_mfma_i32_16x16x32_i8"
# Of an INT4 weight with its part of the group's multiplier, packed in 4 bits in a backend's own layout, else in 8.
_PACKED_INT4, _INT4 = 4.125, 4.25
_KINDS = (("int4", _PACKED_INT4), ("int8", 8.0), ("fp8", 8.0), ("bf16", 16.0))


@dataclass(frozen=True)
class Progress:
    """done of `total` kernels; compiled: of those done, that were not on the disk. built: the last one."""

    done: int
    total: int
    compiled: int
    built: Built | NotBuilt


def build_all(task: BuildTask, cache: Path = CACHE) -> Iterator[Progress]:
    """Every kernel of the task as it is done. cache: a folder, made where it is missing. Raises ValueError for a task
    that cannot be."""
    wanted = task.wanted()
    total = len(wanted.triton) + len(wanted.flydsl)
    done = fresh = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # A process each compiles FlyDSL's, which take longest; this one meanwhile Triton's.
        products = [pool.submit(_product, shape, task.target, cache) for shape in wanted.flydsl]
        launches = (_launch(name, launch, task.target) for name, launch in _named(wanted.triton))
        for source in (launches, (each.result() for each in as_completed(products))):
            for built, new in source:
                done, fresh = done + 1, fresh + new
                yield Progress(done, total, fresh, built)


def _product(shape: ProductShape, target: str, cache: Path) -> tuple[Built | NotBuilt, bool]:
    """And whether it was compiled."""
    name = f"flydsl.{shape.name}"
    file = cache / f"{_key(shape, target)}.s"
    fresh = not file.is_file()
    try:
        if fresh:
            replace_text(file, compiled(shape, target).assembly)
    except BuildError as error:
        return NotBuilt(name, "flydsl", (str(error),)), True
    isa = read_isa(file.read_text())
    bits, matrix = (_PACKED_INT4 if shape.bits == 4 else 8.0), _matrix(isa.lines)
    built = Built(
        name, "flydsl", shape.name, isa, isa.lds + shape.lds_bytes, WAVES, matrix, _INT8_MATRIX, bits, shape.tokens,
        loop_clocks(isa.lines, target),
    )  # fmt: skip
    return built, fresh


def _key(shape: ProductShape, target: str) -> str:
    """Of all that decides the assembly: the sources, the compiler, the product and the target."""
    folder = Path(flydsl.__file__).parent
    digest = hashlib.sha256(f"{shape} {target} {metadata.version('flydsl')}".encode())
    for file in sorted([*folder.glob("*.py"), folder.parent / "ordered.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _launch(name: str, launch: Launch, target: str) -> tuple[Built | NotBuilt, bool]:
    try:
        found = compile_launch(launch, target)
    except Exception as error:  # whatever Triton's and LLVM's passes raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return NotBuilt(name, "triton", (f"does not compile: {lines[-1]}",)), True
    isa = read_isa(found.assembly)
    family, bits, tokens = _product_of(launch)
    built = Built(
        name, "triton", family, isa, isa.lds + found.lds, launch.options["num_warps"],
        _matrix(found.assembly.splitlines()), found.instruction, bits, tokens,
    )  # fmt: skip
    return built, not found.cached


def _product_of(launch: Launch) -> tuple[str, float, int]:
    """Family, bits of a weight and tokens at once of what multiplies weights; else the kernel's name."""
    constants = launch.constants
    match launch.kernel:
        case "expert_products":
            kind, bits = _KINDS[constants["KIND"]]
            return f"experts {kind} {'gate_up' if constants['GATED'] else 'down'}", bits, constants["SIZE"]
        case "integer_products":
            kind, bits = ("int4", _INT4) if constants["INT4"] else ("int8", 8.0)
            return f"linear {kind}", bits, constants["SIZE"]
        case "float_products" | "absorb_heads":
            return launch.kernel, 16.0 if launch.types["weight"] == "*bf16" else 32.0, constants["SIZE"]
    return launch.kernel, 0.0, 0


def _matrix(lines: tuple[str, ...] | list[str]) -> str:
    """The matrix instruction that is there most often; empty where there is none."""
    found = Counter(match[0] for line in lines if (match := _MATRIX.search(line)))
    return max(found, key=lambda name: found[name]) if found else ""


def _named(launches: tuple[Launch, ...]) -> Iterator[tuple[str, Launch]]:
    """By kernel and constants, such as triton.silu_mul_rows.BLOCK1024; what differs in the types of its arguments or in
    numbers that are multiples of 16 is counted."""
    seen: Counter[str] = Counter()
    for launch in launches:
        words = [
            name if value is True else f"{name}{value}"
            for name, value in launch.constants.items()
            if value is not False and not isinstance(value, float)
        ]
        name = ".".join(["triton", launch.kernel, *words])
        seen[name] += 1
        yield (f"{name}.{seen[name]}" if seen[name] > 1 else name), launch
