"""The backend for AMD's GPUs: FlyDSL's experts, AITER's attention, and Triton for whatever these two do not run."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from .aiter.package import PACKAGE, installed_folder, package_fault
from .aiter.source import AiterSource
from .composed import ComposedKernels, compose
from .composition import BackendSource, KernelPlan, SourceOrder, choose
from .flydsl.source import FlyDslSource
from .protocol import Kernels
from .source import KernelShapes, KernelSource
from .triton.tiles import gpu_name

NAME = "rocm"
TARGET = "gfx942"
"""The architecture that is planned for where no GPU is: MI300X and MI325X."""


def plan_rocm(base: Kernels, shapes: KernelShapes, orders: SourceOrder) -> KernelPlan:
    """base: the Triton backend. Raises what `choose` raises."""
    return choose([*_sources(base), BackendSource(base)], shapes, orders)


def rocm_kernels(base: Kernels, plan: KernelPlan | None) -> ComposedKernels:
    """base: the Triton backend, on a GPU or on "meta". Raises SourceError where the plan cannot be followed here."""
    if plan is None:
        raise ValueError("backend: 'rocm' is composed for a model's shapes; give it what `plan_kernels` plans for them")
    return compose(NAME, base, _sources(base), plan)


def missing_rocm() -> str:
    """Why torch computes on no AMD GPU here, and what else is not installed; empty where it is built for them."""
    if torch.version.hip is not None:
        return ""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
    absent = [] if find_spec("flydsl") is not None else ["flydsl"]
    absent += [PACKAGE] if package_fault(installed_folder()) else []
    optional = (
        f"; not installed and optional: {', '.join(absent)}, without which Triton runs their part" if absent else ""
    )
    return (
        f"needs a torch for ROCm, which brings triton; torch {torch.__version__} here is built for {built}{optional}; "
        "docs/mi325x.md says how to install them"
    )


def _sources(base: Kernels) -> Sequence[KernelSource]:
    """All but the base, in the order of `select.SOURCES`."""
    target = TARGET if base.device.type == "meta" else gpu_name(base.device)
    return FlyDslSource(base, target), AiterSource(base, target)


__all__ = ["NAME", "TARGET", "missing_rocm", "plan_rocm", "rocm_kernels"]
