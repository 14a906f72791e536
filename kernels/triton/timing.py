"""Time of what a GPU runs, taken from its own clock."""

from __future__ import annotations

from collections.abc import Callable

import torch

_READ_BYTES = 2 << 30


def graph_time(run: Callable[[], object], repeats: int = 7) -> float:
    """Median µs of a graph's replays."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[len(times) // 2]


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a sum over 2 GiB reads."""
    values = torch.ones(_READ_BYTES // 4, dtype=torch.float32, device=device)
    return _READ_BYTES / graph_time(values.sum) * 1e6


__all__ = ["graph_time", "read_bandwidth"]
