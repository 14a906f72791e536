"""All that the doctor looks at, in one order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from rich.table import Table

from ...actors.model.config import ModelConfig
from ...kernels.select import ACCELERATED, SOURCES
from ..bench.machine import read_bandwidth, this_machine, usable_cores
from ..figures import Figure
from ..synthesize import Synthesis
from .collectives import check_collectives
from .devices import SeenGpu, check_gpus, check_masks, published, seen_gpus
from .disk import check_disk
from .finding import Finding
from .fit import Demand, available_memory, check_fit
from .kernels import check_backend
from .packages import check_packages, installed_packages
from .ray_gpus import LOCAL, check_ray
from .system import check_system
from .target import check_target
from .topology import check_pcie, check_peers, check_topology, pcie_addresses
from .versions import check_aiter, check_rocm, check_triton

_COLORS = {"ok": "green", "unknown": "cyan", "warning": "yellow", "fault": "red"}
_CPU_PROCESSES = 2
_MODEL, _FORMATS = "kimi-k2.5", ("w4a8", "w8a8")


@dataclass(frozen=True)
class Examination:
    """shapes: the model in whose shapes kernels are checked. demand: what is to be served here, None for nothing
    certain; folder: its checkpoint, None where there is none. trouble: what was found wrong with these. target: an
    architecture to compile for as well, or "". backend: that must run here, or "". ray_address: "local", or of the
    cluster that is to serve."""

    shapes: ModelConfig
    demand: Demand | None = None
    folder: Path | None = None
    trouble: tuple[Finding, ...] = ()
    target: str = ""
    backend: str = ""
    ray_address: str = LOCAL


def examine(what: Examination) -> Iterator[Finding]:
    """In about half a minute; with a target as long as its kernels take to compile."""
    hip, seen, installed = torch.version.hip, seen_gpus(), installed_packages()
    yield from check_packages(metadata.requires("flyray") or (), installed)
    yield from check_triton(metadata.requires("torch") or (), installed)
    yield from check_rocm(hip)
    yield from check_aiter(hip is not None)
    yield from check_system(len(seen), hip is not None)
    machine = this_machine()
    rate = read_bandwidth(machine.cores)
    yield Finding("CPU", "ok", str(machine))
    yield Finding("memory", "ok", f"{rate / 1e9:.1f} GB/s read", (Figure("read_bytes_s.cpu", rate, "bytes/s"),))
    yield from what.trouble
    if what.folder is not None:
        yield check_disk(what.folder)
    yield from check_masks(os.environ, hip is not None)
    yield from check_gpus(seen)
    yield from _check_links(seen, hip is not None)
    if what.demand is not None:
        yield from check_fit(what.demand, seen, available_memory())
    if seen:
        yield from check_ray(what.ray_address, len(seen), hip is not None)
    backends = ("cpu", *(_accelerated(hip is not None) if seen else ()), what.backend)
    for backend in dict.fromkeys(filter(None, backends)):
        yield check_backend(backend, usable_cores(), what.shapes)
    if what.target:
        yield from check_target(what.target, *_compiled(what))


def findings_table(findings: list[Finding]) -> Table:
    """A line a finding."""
    table = Table("", "", "", box=None, show_header=False)
    for each in findings:
        color = _COLORS[each.state]
        table.add_row(f"[{color}]{each.state}[/]", each.about, each.text)
    return table


def _check_links(seen: list[SeenGpu], hip: bool) -> Iterator[Finding]:
    """Between GPUs, and of each to the host; without GPUs, between processes."""
    if not seen:
        yield from check_collectives(_CPU_PROCESSES, "cpu", None)
        return
    yield from check_topology(len(seen), hip)
    yield from check_peers(len(seen))
    yield from check_pcie(pcie_addresses(len(seen)))
    if len(seen) > 1:
        yield from check_collectives(len(seen), "cuda", published(seen[0].name))


def _compiled(what: Examination) -> tuple[ModelConfig, tuple[str, ...]]:
    """For which model and formats kernels are compiled: those that are to be served, else Kimi-K2.5's."""
    if what.demand is not None:
        return what.demand.work.model, (what.demand.work.format,)
    return ModelConfig.from_dict(Synthesis(_MODEL).config()), _FORMATS


def _accelerated(hip: bool) -> list[str]:
    """Backends for the GPUs here: those of several sources are for AMD's."""
    return [backend for backend in ACCELERATED if hip or backend not in SOURCES]
