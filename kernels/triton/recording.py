"""What Triton would compile for a GPU that is not here, found by running what launches it, and compiled.

Kernels are launched as on the GPU, on tensors of torch's "meta" device: what a launch would compile, with all its
constants and options, is written down, and nothing runs. So the list of what is compiled is what the backend's own code
asks for, not one beside it.
"""

from __future__ import annotations

import json
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

_WAVE = 64


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

    def note(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        found[Launch(fn.module, fn.name.rpartition(".")[2], compile["specialization_data"])] = None
        return True  # Triton then neither compiles nor launches.

    with _no_device(target), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        run()
    return tuple(found)


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel, from its cache on disk if it is there: one that the same launch on such a GPU finds."""
    with _no_device(target):
        return getattr(import_module(launch.module), launch.kernel).preload(launch.data)


class _NoDevice(DriverBase):
    """A GPU to compile for."""

    def __init__(self, target: str) -> None:
        self._target = GPUTarget("hip", target, _WAVE)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return f"no {self._target.arch}"  # by which Triton keeps what it compiled, apart from that of real devices

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


__all__ = ["Launch", "compile_launch", "record"]
