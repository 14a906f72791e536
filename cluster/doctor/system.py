"""What the operating system allows: shared memory, limits, pages, and files that GPUs are reached by."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from ..figures import Figure
from .finding import Finding

_GIB = 1 << 30
# Ray's object store lies there, and RCCL's and NCCL's buffers between the processes of a node.
_LEAST_SHM = _GIB
_GPU_SHM = 8 * _GIB
# A front has one a connection, Ray's processes many; Ray recommends the second.
_LEAST_FILES, _FILES = 8192, 65536
_AMD_FILES = ("dev/kfd", "dev/dri")


def check_system(gpus: int, hip: bool, root: Path = Path("/")) -> Iterator[Finding]:
    """gpus: that this machine has; hip: whether torch is built for ROCm. root: of the file system."""
    yield check_shared_memory(gpus, root / "dev/shm")
    yield check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if gpus:
        yield check_locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    yield check_balancing(gpus, root / "proc/sys/kernel/numa_balancing", root / "sys/devices/system/node")
    yield check_huge_pages(root / "sys/kernel/mm/transparent_hugepage/enabled")
    if hip:
        yield from check_amd_files(root)


def check_shared_memory(gpus: int, folder: Path) -> Finding:
    """The size of /dev/shm, and what of it is free."""
    if not folder.is_dir():
        return Finding("shared memory", "unknown", f"there is no {folder}")
    found = os.statvfs(folder)
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    figure = Figure("shared_memory_bytes", size, "bytes")
    text = f"{folder} has {size / _GIB:.2f} GiB, {free / _GIB:.2f} free"
    least = _GPU_SHM if gpus > 1 else _LEAST_SHM
    if free < least:
        how = f"give a container --ipc host or --shm-size {least // _GIB}g, or remount it with size={least // _GIB}g"
        who = "Ray's object store and the GPUs' collectives lie" if gpus > 1 else "Ray's object store lies"
        return Finding("shared memory", "warning", f"{text}; {who} there: {how}", (figure,))
    return Finding("shared memory", "ok", text, (figure,))


def check_files(limit: int) -> Finding:
    """The soft limit of open files."""
    if limit == resource.RLIM_INFINITY or limit >= _LEAST_FILES:
        return Finding("open files", "ok", f"at most {_of(limit)}")
    return Finding(
        "open files",
        "warning",
        f"at most {limit}: every client takes one, and Ray's processes share as many; ulimit -n {_FILES}, "
        f"LimitNOFILE= in a unit, --ulimit nofile={_FILES} for a container",
    )


def check_locked(limit: int) -> Finding:
    """The soft limit of locked memory, which RDMA and pinned buffers take."""
    if limit == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "no limit")
    return Finding(
        "locked memory",
        "warning",
        f"at most {limit / _GIB:.2f} GiB: RDMA between nodes and large pinned buffers need more; ulimit -l unlimited, "
        "LimitMEMLOCK=infinity in a unit, --ulimit memlock=-1 for a container",
    )


def check_balancing(gpus: int, setting: Path, nodes: Path) -> Finding:
    """Whether the kernel moves pages between NUMA nodes on its own."""
    count = len(list(nodes.glob("node[0-9]*"))) or 1
    text = f"{count} NUMA node{'s' if count > 1 else ''}"
    if not setting.exists():
        return Finding("NUMA", "ok" if count == 1 else "unknown", f"{text}; no {setting}")
    if setting.read_text().strip() == "0" or count == 1:
        return Finding("NUMA", "ok", f"{text}; the kernel moves no pages between them")
    whose = "of a GPU's queues and host buffers" if gpus else "that shards read"
    return Finding(
        "NUMA",
        "warning",
        f"{text}, and the kernel moves pages {whose}, stopping who reads them: sysctl -w kernel.numa_balancing=0",
    )


def check_huge_pages(setting: Path) -> Finding:
    """Whether memory may come in pages of 2 MiB, which CPU shards ask for."""
    if not setting.exists():
        return Finding("huge pages", "unknown", f"no {setting}")
    chosen = setting.read_text().partition("[")[2].partition("]")[0]
    if chosen == "never":
        return Finding(
            "huge pages", "warning", f"off: CPU kernels read weights up to 1.5 times slower; echo madvise > {setting}"
        )
    return Finding("huge pages", "ok", chosen)


def check_amd_files(root: Path) -> Iterator[Finding]:
    """The driver's files, which a container must be given, and the user's right to open them."""
    for name in _AMD_FILES:
        path = root / name
        if not path.exists():
            text = f"is not here: load the driver amdgpu, or give a container --device /{name}"
            yield Finding(f"/{name}", "fault", text)
            continue
        files = sorted(path.glob("renderD*")) if path.is_dir() else [path]
        closed = [file.name for file in files if not os.access(file, os.R_OK | os.W_OK)]
        if closed or not files:
            text = f"{', '.join(closed) or 'it'} cannot be opened: add this user to the groups render and video"
            yield Finding(f"/{name}", "fault", f"{text}, or a container by --group-add")
        else:
            yield Finding(f"/{name}", "ok", f"{len(files)} open to this user" if path.is_dir() else "open to this user")


def _of(limit: int) -> str:
    return "any number" if limit == resource.RLIM_INFINITY else str(limit)
