"""What collectives between the GPUs of this machine take, one process a GPU; without GPUs, between CPU processes.

The same calls as the exchange between shards makes: an all-to-all and an all-gather of `torch.distributed`, over RCCL
or NCCL on GPUs and gloo on CPUs, of a decode step's rows and of as many bytes as show the links' rate.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..figures import Figure
from ..plan.gpu import Gpu
from .finding import Finding

_SMALL_BYTES = 8 * 7168  # eight rows of Kimi-K2.5 in one byte a value
_LARGE_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
_REPEATS = {"cuda": 30, "cpu": 10}
_TIMEOUT_S = 40.0
_END_S = 5.0
# Of what is published: a small message that takes longer, or large ones that move less, are not the links' doing.
_SLOWEST, _LEAST = 5.0, 0.3


@dataclass(frozen=True)
class CollectiveTime:
    """small_s: of `_SMALL_BYTES` to each; large_bytes_s: that one process sends of large messages a second, to all
    others together. Medians of the slowest process."""

    name: str
    small_s: float
    large_bytes_s: float


class CollectiveFailure(Exception):
    """The processes did not come to an end; the message says which and why."""


def check_collectives(processes: int, device: str, gpu: Gpu | None) -> Iterator[Finding]:
    """device: "cuda" for as many GPUs, which RCCL or NCCL connects, or "cpu" for gloo. gpu: what is published of them,
    if it is known."""
    backend = dist.get_default_backend_for_device(device)
    kind = "RCCL" if backend == "nccl" and torch.version.hip else backend
    about = f"{kind}, {processes} processes"
    try:
        times = time_collectives(processes, device)
    except CollectiveFailure as error:
        hint = "; NCCL_DEBUG=INFO says more" if backend == "nccl" else ""
        yield Finding(about, "fault", f"{error}{hint}")
        return
    yield from (judge(about, each, gpu if device == "cuda" else None) for each in times)


def judge(about: str, took: CollectiveTime, gpu: Gpu | None) -> Finding:
    """One collective, against what is published of the links."""
    at = took.name.replace("-", "_")
    figures = (
        Figure(f"{at}_us", 1e6 * took.small_s, "us"),
        Figure(f"{at}_bytes_s", took.large_bytes_s, "bytes/s"),
    )
    text = f"{took.name} {1e6 * took.small_s:,.0f} µs for 8 rows, {took.large_bytes_s / 1e9:,.1f} GB/s out of each"
    if gpu is None:
        return Finding(about, "ok", text, figures)
    if 1e6 * took.small_s > _SLOWEST * gpu.exchange_us:
        text += f"; {gpu.exchange_us:g} µs are usual: is a CPU core free for each process, and is IOMMU off (iommu=pt)?"
        return Finding(about, "warning", text, figures)
    if took.large_bytes_s < _LEAST * gpu.egress:
        text += f" of {gpu.egress / 1e9:,.0f} published: see the links between GPUs above, and NCCL_DEBUG=INFO"
        return Finding(about, "warning", text, figures)
    return Finding(about, "ok", text, figures)


def time_collectives(processes: int, device: str, timeout_s: float = _TIMEOUT_S) -> list[CollectiveTime]:
    """Starts the processes, and ends them. Raises CollectiveFailure where one fails or none answers in time."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        pipes, running = [], []
        for rank in range(processes):
            mine, theirs = context.Pipe(duplex=False)
            arguments = theirs, rank, processes, device, str(Path(folder) / "store"), timeout_s
            running.append(context.Process(target=_run, args=arguments, daemon=True))
            running[-1].start()
            theirs.close()
            pipes.append(mine)
        patience = 0.0
        try:
            found = gather(pipes, timeout_s)
            patience = _END_S
        finally:
            for process in running:
                process.join(patience)
                process.kill()
                process.join()
    return [
        CollectiveTime(name, max(each[name][0] for each in found), min(each[name][1] for each in found))
        for name in found[0]
    ]


def gather(pipes: list[Connection], timeout_s: float) -> list[dict[str, tuple[float, float]]]:
    """Of every process, seconds and bytes a second by collective. Raises CollectiveFailure, naming who is silent."""
    deadline, found = time.monotonic() + timeout_s, {}
    while len(found) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = ", ".join(str(rank) for rank in range(len(pipes)) if rank not in found)
            raise CollectiveFailure(f"process {missing} did not answer within {timeout_s:g} s: a collective hangs")
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                answer = pipe.recv()
            except EOFError:
                raise CollectiveFailure(f"process {rank} ended without an answer") from None
            if isinstance(answer, str):
                raise CollectiveFailure(f"process {rank}: {answer}")
            found[rank] = answer
    return [found[rank] for rank in range(len(pipes))]


def _run(answer: Connection, rank: int, processes: int, device: str, store: str, timeout_s: float) -> None:
    """One process's work."""
    warnings.simplefilter("ignore", FutureWarning)  # newer torch has other names for what older torch has too
    try:
        answer.send(_measure(rank, processes, device, store, timeout_s))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")


def _measure(rank: int, processes: int, device: str, store: str, timeout_s: float) -> dict[str, tuple[float, float]]:
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=dist.FileStore(store, processes),  # pyright: ignore[reportPrivateImportUsage]
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        return {
            name: (
                _median_s(call, _SMALL_BYTES, processes, place)[0],
                _median_s(call, _LARGE_BYTES[device] // processes, processes, place)[1],
            )
            for name, call in (("all-to-all", _all_to_all), ("all-gather", _all_gather))
        }
    finally:
        dist.destroy_process_group()


def _median_s(
    call: Callable[[Tensor, Tensor], None], size: int, processes: int, place: torch.device
) -> tuple[float, float]:
    """Seconds of a call in which `size` bytes go to each process, and bytes a second to all others."""
    mine = torch.ones(processes * size, dtype=torch.uint8, device=place)
    theirs = torch.empty_like(mine)
    times = []
    for turn in range(_REPEATS[place.type] + 2):
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        begin = time.perf_counter()
        call(theirs, mine)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        if turn > 1:  # the first connect the processes
            times.append(time.perf_counter() - begin)
    seconds = statistics.median(times)
    return seconds, (processes - 1) * size / seconds


def _all_to_all(theirs: Tensor, mine: Tensor) -> None:
    dist.all_to_all_single(theirs, mine)


def _all_gather(theirs: Tensor, mine: Tensor) -> None:
    dist.all_gather_into_tensor(theirs, mine[: len(mine) // dist.get_world_size()])


__all__ = ["CollectiveFailure", "CollectiveTime", "check_collectives", "judge", "time_collectives"]
