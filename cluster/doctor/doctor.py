"""All that the doctor looks at, in one order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata

import torch
from rich.table import Table

from ...actors.model.config import ModelConfig
from ...kernels.select import ACCELERATED
from ..bench.machine import read_bandwidth, this_machine, usable_cores
from ..figures import Figure
from .devices import check_gpus, check_masks
from .finding import Finding
from .kernels import check_backend, check_target
from .packages import check_packages, installed_packages

_COLORS = {"ok": "green", "warning": "yellow", "fault": "red"}


def examine(model: ModelConfig, target: str) -> Iterator[Finding]:
    """model: whose shapes the kernels are checked in. target: an architecture to compile for as well, or ""."""
    yield from check_packages(metadata.requires("flyray") or (), installed_packages())
    machine = this_machine()
    rate = read_bandwidth(machine.cores)
    yield Finding("CPU", "ok", str(machine))
    yield Finding("memory", "ok", f"{rate / 1e9:.1f} GB/s read", (Figure("read_bytes_s.cpu", rate, "bytes/s"),))
    yield from check_masks(os.environ, bool(torch.version.hip))
    yield from check_gpus()
    for backend in ("cpu", *(ACCELERATED if torch.cuda.is_available() else ())):
        yield check_backend(backend, usable_cores(), model)
    if target:
        yield from check_target(target)


def findings_table(findings: list[Finding]) -> Table:
    """A line a finding."""
    table = Table("", "", "", box=None, show_header=False)
    for each in findings:
        color = _COLORS[each.state]
        table.add_row(f"[{color}]{each.state}[/]", each.about, each.text)
    return table
