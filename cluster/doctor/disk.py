"""How fast a model's folder is read, past what the operating system keeps of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..figures import Figure
from .finding import Finding

_CHUNK = 16 << 20
_MOST_BYTES = 2 << 30
_MOST_S = 4.0


def check_disk(folder: Path) -> Finding:
    """Reads the largest file of a checkpoint from its beginning, for a few seconds at most."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    if not files:
        return Finding("disk", "unknown", f"{folder} has no safetensors files to read")
    size = sum(file.stat().st_size for file in files)
    read, seconds = read_cold(files[-1])
    rate = read / seconds
    figure = Figure("read_bytes_s.disk", rate, "bytes/s")
    text = f"{folder}: {rate / 1e9:.2f} GB/s; {size / 1e9:,.2f} GB take {size / rate:,.0f} s to read once"
    return Finding("disk", "ok", text, (figure,))


def read_cold(file: Path) -> tuple[int, float]:
    """Bytes read of a file and the seconds they took, after the system was told to forget its pages."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(_CHUNK)
        read, begin = 0, time.perf_counter()
        while read < _MOST_BYTES and time.perf_counter() - begin < _MOST_S:
            count = os.readv(descriptor, [buffer])
            if not count:
                break
            read += count
        return read, time.perf_counter() - begin
    finally:
        os.close(descriptor)
