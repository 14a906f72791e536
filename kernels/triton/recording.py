"""What Triton would compile for a GPU that is not here, found by running what launches it, and compiled.

Kernels are launched as on the GPU, on tensors of torch's "meta" device: what a launch would compile, with all its
constants and options, is written down, and nothing runs. So the list of what is compiled is what the backend's own code
asks for, not one beside it.
"""

# What Triton's own base class says of results is not what its drivers give.
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

_WAVE, _WARP = 64, 32
_DOT = re.compile(r"tt\.dot .*tensor<[\dx]*x(\w+), .*-> tensor<[\dx]*x(\w+),")


@dataclass(frozen=True)
class Launch:
    """A kernel as one launch specializes it. data: Triton's own description, which `JITFunction.preload` takes."""

    module: str
    kernel: str
    data: str

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Of `tl.constexpr`, by name; and the numbers that are specialized, which are 1."""
        described = json.loads(self.data)
        names = list(described["signature"])
        values = (each["constexpr"] if isinstance(each, dict) else each for each in described["constant_vals"])
        return {names[key[0]]: value for key, value in zip(described["constant_keys"], values, strict=True)}

    @cached_property
    def options(self) -> dict[str, Any]:
        """Such as num_warps and num_stages."""
        return json.loads(self.data)["options"]

    @cached_property
    def types(self) -> dict[str, str]:
        """Of the arguments that are not constants, such as "*fp32"."""
        return {name: type for name, type in json.loads(self.data)["signature"].items() if type != "constexpr"}


def record(run: Callable[[], object], target: str) -> tuple[Launch, ...]:
    """Every different kernel that `run` launches on an architecture such as gfx942, in the order of the first launch.
    Its tensors are on the "meta" device."""
    found: dict[Launch, None] = {}

    def note(*, fn: Any, compile: Any, **_: object) -> bool:
        found[Launch(fn.module, fn.name.rpartition(".")[2], compile["specialization_data"])] = None
        return True  # Triton then neither compiles nor launches.

    with _no_device(target), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        run()
    return tuple(found)


@dataclass(frozen=True)
class Compiled:
    """assembly: with its metadata. lds: bytes of a program. instruction: a pattern of the matrix instruction that the
    kernel's products are to become; empty where it has none. cached: whether Triton had it on disk."""

    assembly: str
    lds: int
    instruction: str
    cached: bool


def compile_launch(launch: Launch, target: str) -> Compiled:
    """As Triton compiles it for that GPU: what is on disk then is what the same launch there finds. Raises what Triton
    raises for a kernel that does not compile."""
    hits: list[bool] = []

    def listen(*, cache_hit: bool, **_: object) -> None:
        hits.append(cache_hit)

    with _no_device(target), knobs.compilation.scope():
        knobs.compilation.listener = listen
        kernel = getattr(import_module(launch.module), launch.kernel).preload(launch.data)
    return Compiled(
        kernel.asm.get("amdgcn") or kernel.asm["ptx"],
        kernel.metadata.shared,
        _instruction(kernel.asm["ttgir"]),
        all(hits),
    )


def _instruction(text: str) -> str:
    """Of a kernel's intermediate form: all its products have the same types."""
    found = _DOT.search(text)
    return f"v_mfma_{found[2]}_.*{found[1]}" if found else ""


def _gpu_target(name: str) -> GPUTarget:
    """gfx942 and the like are AMD's, sm_90 and the like NVIDIA's."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), _WARP)
    return GPUTarget("hip", name, _WAVE)


class _NoDevice(DriverBase):
    """A GPU to compile for."""

    def __init__(self, target: str) -> None:
        self._target, self._device = _gpu_target(target), object()

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> object:
        return self._device  # by which Triton keeps what it compiled: nothing for a new one

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError


@contextmanager
def _no_device(target: str) -> Iterator[None]:
    before = driver._active
    driver.set_active(_NoDevice(target))
    try:
        yield
    finally:
        driver._active = before


__all__ = ["Compiled", "Launch", "compile_launch", "record"]
