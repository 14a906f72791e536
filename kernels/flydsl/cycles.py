"""How long one run of a compiled loop keeps its wave busy, by LLVM's model of the machine (llvm-mca).

Good for comparing two schedules of one loop, not for predicting time: memory answers after a fixed time, and nobody
else is on the SIMD.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

ANALYZERS = ("llvm-mca-19", "llvm-mca-20", "llvm-mca-18", "llvm-mca")
"""Of which one that knows the target must be on the path."""
CLOCKS = 4
"""Of the GPU, in one cycle of LLVM's model: as long as a vector instruction takes."""
_RUNS = 20
_BUFFER = re.compile(r"buffer_load_(\w+) ([^,]+), (v\d+), s\[(\d+):\d+\], 0 offen")
_TOTAL = re.compile(r"^Total Cycles:\s+(\d+)$", re.MULTILINE)


def loop_clocks(lines: Sequence[str], target: str) -> float | None:
    """Clocks of one run of a loop, given its instructions without the branch back; None where no llvm-mca knows the
    target.

    Raises RuntimeError where llvm-mca cannot read them.
    """
    # llvm-mca 19 does not survive a wait after a load by a buffer; a load from global memory takes it as long.
    text = "\n".join(_BUFFER.sub(_global, line) for line in lines)
    for name in filter(shutil.which, ANALYZERS):
        command = [name, "-mtriple=amdgcn", f"-mcpu={target}", f"-iterations={_RUNS}"]
        done = subprocess.run(command, input=text + "\n", capture_output=True, text=True, check=False)
        if "not a recognized processor" in done.stderr:
            continue
        found = _TOTAL.search(done.stdout)
        if done.returncode or found is None:
            reason = " ".join(done.stderr.strip().splitlines()[:2])
            raise RuntimeError(f"{name} for {target}: {reason or 'it said nothing'}")
        return int(found[1]) * CLOCKS / _RUNS
    return None


def _global(match: re.Match[str]) -> str:
    base = int(match[4])
    return f"global_load_{match[1]} {match[2]}, {match[3]}, s[{base}:{base + 1}]"


__all__ = ["ANALYZERS", "CLOCKS", "loop_clocks"]
