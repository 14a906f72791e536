"""The machine that a measurement ran on, and its ceilings: what memory gives, and what its matrix units multiply."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

# Larger than the caches that a machine has for itself.
READ_BYTES = 512 << 20
_REPEATS = 3
# A product large enough to reach the peak: 2 * 1024 * 2048 * 2048 operations.
_PEAK_SHAPE = (1024, 2048, 2048)
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")


@dataclass(frozen=True)
class Machine:
    """cpu: its name. cores: that this process may use. instructions: those that the kernels care for."""

    cpu: str
    cores: int
    instructions: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.cpu}, {self.cores} cores, {' '.join(self.instructions) or 'no vector instructions known'}"


def this_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> Machine:
    """As the kernel describes it; where there is no such file, as Python does."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    found = tuple(name for name in _INSTRUCTION_SETS if name in flags)
    return Machine(fields.get("model name") or platform.processor() or platform.machine(), usable_cores(), found)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def read_bandwidth(threads: int, size: int = READ_BYTES) -> float:
    """Bytes a second that `threads` threads read from memory, the best of several passes over `size` bytes."""
    values = torch.ones(size // 4)
    with torch_threads(threads):
        return size / _best(values.sum)


def int8_peak(threads: int) -> float:
    """Integer operations a second (a multiplication and an addition are two) of oneDNN's INT8 product, the best of
    several. Raises RuntimeError where torch has no oneDNN."""
    rows, columns, inner = _PEAK_SHAPE
    x = torch.randint(0, 127, (rows, inner), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (columns, inner), dtype=torch.int8)
    scales, zeros = torch.ones(columns), torch.zeros(columns, dtype=torch.int64)
    operations = torch.ops.onednn

    def run() -> object:
        return operations.qlinear_pointwise(
            x, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    with torch_threads(threads):
        packed = operations.qlinear_prepack(weight, list(x.shape))
        return 2 * rows * columns * inner / _best(run)


def bf16_peak(threads: int) -> float:
    """Operations a second of torch's bfloat16 product, the best of several."""
    rows, columns, inner = _PEAK_SHAPE
    x, weight = torch.ones(rows, inner, dtype=torch.bfloat16), torch.ones(inner, columns, dtype=torch.bfloat16)
    with torch_threads(threads):
        return 2 * rows * columns * inner / _best(lambda: x @ weight)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """torch computes with `threads` threads in the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], object]) -> float:
    """Least seconds of several runs after one that does not count."""
    run()
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return min(times)
