"""Packages that must fit each other: torch and the driver, torch and Triton, flyray and AITER."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from ...kernels.aiter.calls import OPERATION_CALLS
from ...kernels.aiter.package import PACKAGE, installed_folder, package_fault
from ...kernels.aiter.source import release_fault
from .finding import Finding

_TRITONS = ("triton", "triton-rocm", "pytorch-triton-rocm")
_LEAST_ROCM = Version("6.3")


def check_rocm(built: str | None, root: Path = Path("/")) -> Iterator[Finding]:
    """built: the ROCm that torch was built with, `torch.version.hip`; None for a torch of another kind."""
    if built is None:
        return
    driver = _line(root / "sys/module/amdgpu/version")
    here = next(map(_line, sorted(root.glob("opt/rocm*/.info/version"))), "")
    text = f"torch is built with HIP {built}; /opt/rocm has {here or 'no version'}, the driver amdgpu is "
    text += driver or "the kernel's own (no version)"
    if _version(built) < _LEAST_ROCM:
        yield Finding("ROCm", "warning", f"{text}: nothing here was prepared for a ROCm before {_LEAST_ROCM}")
    elif here and _version(here).release[:2] != _version(built).release[:2]:
        yield Finding(
            "ROCm", "warning", f"{text}: take a torch built with the ROCm that is installed, or its container"
        )
    else:
        yield Finding("ROCm", "ok", text)


def check_triton(torch_requires: Iterable[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """torch_requires: as `importlib.metadata.requires("torch")` gives them; a torch for CPUs asks for no Triton."""
    for text in torch_requires:
        wanted = Requirement(text)
        if wanted.name.lower().replace("_", "-") not in _TRITONS or "extra" in str(wanted.marker or ""):
            continue
        found = next((installed[name] for name in _TRITONS if name in installed), None)
        said = f"torch asks for {wanted.name}{wanted.specifier}"
        if found is None:
            yield Finding("triton", "fault", f"is not installed; {said}: pip install '{wanted.name}{wanted.specifier}'")
        elif not wanted.specifier.contains(found, prereleases=True):
            yield Finding("triton", "warning", f"is {found}; {said}, and another one's kernels may not load")
        else:
            yield Finding("triton", "ok", f"{found}, as torch asks for")


def check_aiter(needed: bool, folder: Path | None = None) -> Iterator[Finding]:
    """needed: where torch is built for ROCm; elsewhere AITER is no use. folder: of the module `aiter`."""
    if not needed:
        return
    folder = folder or installed_folder()
    fault = package_fault(folder)
    if fault or folder is None:
        text = f"{fault.removeprefix('package: ')}; without it Triton's kernels run its part"
        yield Finding(PACKAGE, "warning", text)
        return
    faults = {operation: release_fault(operation, None, folder) for operation in sorted(OPERATION_CALLS)}
    faults = {operation: fault for operation, fault in faults.items() if fault}
    if faults:
        operation, fault = next(iter(faults.items()))
        text = f"{', '.join(faults)} do not fit its release, Triton's kernels run them: {operation}: {fault}"
        yield Finding(PACKAGE, "warning", text)
    else:
        yield Finding(PACKAGE, "ok", f"in {folder}, all {len(OPERATION_CALLS)} operations fit its signatures")


def _version(text: str) -> Version:
    """The leading numbers: "6.4.43484-123abc" is 6.4.43484."""
    match = re.match(r"\d+(\.\d+)*", text)
    return Version(match[0] if match else "0")


def _line(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
