"""What an accelerator reaches at most: reading its memory, and multiplying INT8 and bfloat16."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .machine import bf16_peak, int8_peak, read_bandwidth

_READ_BYTES = 4 << 30
_SIZE = 8192
_REPEATS = 10


@dataclass(frozen=True)
class DeviceCeilings:
    """read: bytes a second. int8, bf16: operations a second of a large product."""

    read: float
    int8: float
    bf16: float


def measure_ceilings(device: torch.device, threads: int) -> DeviceCeilings:
    """threads: of a CPU. A GPU's are torch's sum over 4 GiB and its products of 8192 x 8192 matrices, medians."""
    if device.type == "cpu":
        return DeviceCeilings(read_bandwidth(threads), int8_peak(threads), bf16_peak(threads))
    left = torch.randint(-127, 128, (_SIZE, _SIZE), dtype=torch.int8, device=device)
    int8 = median_seconds(device, lambda: torch._int_mm(left, left.T))  # pyright: ignore[reportPrivateImportUsage]
    wide = torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device)
    bf16 = median_seconds(device, lambda: wide @ wide)
    # Last: the products' libraries keep workspaces, which would hold on to this block's memory.
    values = torch.ones(_READ_BYTES // 4, device=device)
    return DeviceCeilings(_READ_BYTES / median_seconds(device, values.sum), 2 * _SIZE**3 / int8, 2 * _SIZE**3 / bf16)


def median_seconds(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds that `run` takes on a device, after two runs that do not count."""
    times = []
    for turn in range(_REPEATS + 2):
        begin = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if turn > 1:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)
