"""Compiles products for a GPU that need not be here, and says what came out.

    python -m flyray.kernels.flydsl.build gfx942

FlyDSL takes its target and where to leave the assembly from the environment alone, so each product is compiled by a
process of its own. It needs a linker: ROCm's, or LLVM's `ld.lld` (Debian: lld).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path

from .cycles import loop_clocks
from .isa import LDS_BYTES, Isa, read_isa
from .shape import BLOCKS, ProductShape

LINKERS = ("ld.lld", "ld.lld-19", "ld.lld-18", "ld.lld-17")
"""Of which one must be on the path where there is no ROCm."""
KIMI = tuple(
    ProductShape(bits, inner, rows, units, gated, tokens)
    for bits in (4, 8)
    for inner, rows, units, gated in ((7168, 2048, 128, True), (2048, 7168, 224, False))
    for tokens in BLOCKS
)
"""The products of Kimi-K2.5's experts; expert parallelism changes how many experts there are, not a kernel."""


class BuildError(RuntimeError):
    """A kernel that does not compile here; the message says what is missing or what the compiler said."""


def build(shape: ProductShape, target: str) -> Isa:
    """The assembly's figures of one product for an architecture such as gfx942. Raises BuildError."""
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
        found = list(dump.rglob("*final_isa.s"))
        if done.returncode or len(found) != 1:
            lines = done.stderr.strip().splitlines()[-3:] or [f"{len(found)} files of assembly"]
            raise BuildError(f"{shape.name} for {target}: {' '.join(lines)}")
        return read_isa(found[0].read_text())


def _linker_root(root: Path) -> Path:
    """A folder laid out as ROCm's, with a linker that is on the path."""
    linker = next((path for name in LINKERS if (path := shutil.which(name))), None)
    if linker is None:
        raise BuildError(f"no linker: set ROCM_PATH, or install one of {', '.join(LINKERS)} (Debian: lld)")
    place = root / "llvm" / "bin"
    place.mkdir(parents=True)
    (place / "ld.lld").symlink_to(linker)
    return root


def main(target: str) -> None:
    """Prints a line for every product of Kimi-K2.5."""
    print("product  vgpr  waves  spills  scratch  LDS  matrix  vector  a weight  barriers  under way  clocks")
    for shape in KIMI:
        isa = build(shape, target)
        resident = min(isa.waves, LDS_BYTES // (isa.lds + shape.lds_bytes))
        registers = isa.vgpr, resident, isa.spills, isa.scratch, shape.lds_bytes
        each = f"{isa.vector / shape.lane_weights:.2f}"
        loop = isa.matrix, isa.vector, each, isa.loop["s_barrier"], isa.under_way, loop_clocks(isa.lines, target)
        print(shape.name, *registers, *loop, sep="  ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
