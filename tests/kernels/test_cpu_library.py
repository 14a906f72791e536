from __future__ import annotations

import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import expert_weights, normal, pairs

from flyray.kernels.composed import kernel_name
from flyray.kernels.cpu.backend import CpuKernels
from flyray.kernels.cpu.library import LibraryError, library_path
from flyray.kernels.protocol import ActivationFormat, Int4Matrix
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.select import select_kernels


def threads() -> set[str]:
    """Of this process, by their numbers."""
    return set(os.listdir("/proc/self/task"))


def gone(which: set[str]) -> bool:
    """Waits until these threads are: one that was joined may stand there for a moment yet."""
    deadline = time.monotonic() + 60
    while which & threads() and time.monotonic() < deadline:
        pass
    return not which & threads()


def test_a_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match=r"pip install -e \."):
        library_path(tmp_path)


def test_selects_by_name() -> None:
    kernels = select_kernels("cpu", 2)
    assert isinstance(kernels, CpuKernels)
    assert kernels.threads == 2
    assert kernel_name(kernels, "experts") == "cpu.experts"
    kernels.close()


def test_the_reference_runs_on_that_many_torch_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert select_kernels("reference", 1).name == "reference"
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_refuses_an_unknown_backend_variant_or_operation() -> None:
    with pytest.raises(ValueError, match="known: cpu, reference"):
        select_kernels("cuda", 1)
    with pytest.raises(ValueError, match="threads is 0"):
        select_kernels("cpu", 0)
    with pytest.raises(LibraryError, match='"sse9"'):
        CpuKernels(1, "sse9")
    with pytest.raises(ValueError, match="matmul"):
        kernel_name(ReferenceKernels(), "matmul")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_closing_joins_the_threads_and_refuses_later_calls() -> None:
    others = threads()
    kernels = CpuKernels(4)
    own = threads() - others
    assert len(own) == 3
    kernels.close()
    kernels.close()
    assert gone(own)
    with pytest.raises(LibraryError, match="closed"):
        kernels.linear(torch.zeros(1, 4), torch.zeros(2, 4))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads threads' states in /proc")
def test_threads_sleep_when_there_is_nothing_to_do() -> None:
    others = threads()
    kernels = CpuKernels(3)
    x, weight = normal(1, 8, 512), normal(2, 512, 512)
    graph = kernels.capture(lambda: kernels.linear(kernels.linear(x, weight), weight))
    graph.replay()
    awake = threads() - others
    assert len(awake) == 2
    deadline = time.monotonic() + 60
    while awake and time.monotonic() < deadline:
        states = {thread: Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2] for thread in awake}
        awake = {thread for thread, state in states.items() if not state.startswith(" S")}
    assert not awake
    before = graph.result.clone()
    graph.replay()
    assert torch.equal(graph.result, before)
    kernels.close()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_dropping_the_object_joins_the_threads() -> None:
    others = threads()
    kernels = CpuKernels(3)
    own = threads() - others
    assert len(own) == 2
    del kernels
    gc.collect()
    assert gone(own)


def test_several_python_threads_share_one_pool() -> None:
    kernels = CpuKernels(3)
    weights = expert_weights(Int4Matrix, 4, 128, 96)
    token, expert = pairs(20, 4, 60)
    inputs = [kernels.quantize(normal(seed, 20, 128), ActivationFormat.INT8) for seed in range(8)]
    expected = [kernels.experts(x, token, expert, weights) for x in inputs]
    with ThreadPoolExecutor(4) as executor:
        for _ in range(5):
            results = executor.map(lambda x: kernels.experts(x, token, expert, weights), inputs)
            for actual, wanted in zip(results, expected, strict=True):
                assert torch.equal(actual, wanted)
    kernels.close()


def test_does_not_follow_torchs_default_dtype() -> None:
    kernels = CpuKernels(1)
    x, weight = normal(1, 2, 8), normal(2, 3, 8)
    expected = kernels.linear(x, weight)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(kernels.linear(x, weight), expected)
        assert torch.equal(ReferenceKernels().linear(x, weight), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        kernels.close()
