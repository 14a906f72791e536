"""Compiles products for a GPU that need not be here, and says what came out.

FlyDSL takes its target and where to leave the assembly from the environment alone, so each product is compiled by a
process of its own. It needs a linker: ROCm's, or LLVM's `ld.lld` (Debian: lld).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path

from ..protocol import ExpertMatrix, Int4Matrix, Int8Matrix
from .isa import Isa, read_isa
from .shape import BLOCKS, ProductShape, unit_count

LINKERS = ("ld.lld", "ld.lld-19", "ld.lld-18", "ld.lld-17")
"""Of which one must be on the path where there is no ROCm."""


def products(hidden: int, intermediate: int, kinds: Iterable[type[ExpertMatrix]]) -> tuple[ProductShape, ...]:
    """What a model's experts need; expert parallelism changes how many experts there are, not a kernel. kinds: of
    their matrices; other than INT4 and INT8 have no product here."""
    bits = [4 if kind is Int4Matrix else 8 for kind in kinds if kind in (Int4Matrix, Int8Matrix)]
    matrices = (hidden, 2 * intermediate, True), (intermediate, hidden, False)
    return tuple(
        ProductShape(width, inner, rows // 2 if gated else rows, unit_count(rows, gated), gated, tokens)
        for width in bits
        for inner, rows, gated in matrices
        for tokens in BLOCKS
    )


KIMI = products(7168, 2048, (Int4Matrix, Int8Matrix))
"""The products of Kimi-K2.5's experts."""


class BuildError(RuntimeError):
    """A kernel that does not compile here; the message says what is missing or what the compiler said."""


@dataclass(frozen=True)
class Code:
    """What the compiler made of a product: the text of its kernel in LLVM's language, and of its assembly."""

    llvm: str
    assembly: str


def build(shape: ProductShape, target: str) -> Isa:
    """The assembly's figures of one product for an architecture such as gfx942. Raises BuildError."""
    return read_isa(compiled(shape, target).assembly)


def compiled(shape: ProductShape, target: str) -> Code:
    """One product for an architecture such as gfx942. Raises BuildError."""
    if find_spec("flydsl") is None:
        raise BuildError("FlyDSL is not installed; install it with: pip install 'flyray[rocm]'")
    with tempfile.TemporaryDirectory(prefix="flyray-build-") as scratch:
        root, dump = Path(scratch) / "rocm", Path(scratch) / "dump"
        environment = os.environ | {
            "ARCH": target, "COMPILE_ONLY": "1", "FLYDSL_RUNTIME_ENABLE_CACHE": "0",
            "FLYDSL_DUMP_IR": "1", "FLYDSL_DUMP_DIR": str(dump),
        }  # fmt: skip
        if "ROCM_PATH" not in os.environ:
            environment["ROCM_PATH"] = str(_linker_root(root))
        command = [sys.executable, "-m", f"{__package__}.compile_product", *(str(int(each)) for each in astuple(shape))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = [list(dump.rglob(name)) for name in ("*llvm_ir.ll", "*final_isa.s")]
        if done.returncode or [len(each) for each in found] != [1, 1]:
            lines = done.stderr.strip().splitlines()[-3:] or [f"{len(found[1])} files of assembly"]
            raise BuildError(f"{shape.name} for {target}: {' '.join(lines)}")
        return Code(*(each[0].read_text() for each in found))


def _linker_root(root: Path) -> Path:
    """A folder laid out as ROCm's, with a linker that is on the path."""
    linker = next((path for name in LINKERS if (path := shutil.which(name))), None)
    if linker is None:
        raise BuildError(f"no linker: set ROCM_PATH, or install one of {', '.join(LINKERS)} (Debian: lld)")
    place = root / "llvm" / "bin"
    place.mkdir(parents=True)
    (place / "ld.lld").symlink_to(linker)
    return root
