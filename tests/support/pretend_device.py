"""An accelerator that is not there: its tensors compute on the CPU, and refuse to meet CPU tensors.

What runs under `pretend_device` puts every tensor where it belongs, or fails as it would on a GPU: an operation on
tensors of two devices, `numpy` of a device's tensor. Copies between the devices and 0-dimensional CPU tensors beside
others are allowed, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("maia", 0)
_DISPATCHED = torch.device("meta")  # what torch's C++ part thinks; it knows how to work with those
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class DeviceTensor(Tensor):
    """A tensor that says it is on DEVICE; `held` holds its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> DeviceTensor:
        made: DeviceTensor = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=_DISPATCHED
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return DEVICE

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeviceTensor({self.held!r})"

    def tolist(self) -> Any:
        """Copies to the host, as `Tensor.tolist`, which refuses subclasses."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Takes up what makes tensors on the device out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """DEVICE can be used inside, in this thread."""
    # `torch.tensor` then makes a CPU tensor and copies it by an operation that the mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.aten._pin_memory.default:
        return args[0]
    tensors = list(_tensors(args))
    here = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    shapes = [list(tensor.shape) for tensor in tensors if not isinstance(tensor, DeviceTensor) and tensor.dim()]
    if here and shapes and func not in _COPIES:
        raise RuntimeError(f"{func}: tensors on {DEVICE} and on cpu, of shapes {shapes}, in one operation")
    device = kwargs.get("device")
    inner = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if device is not None:
        inner["device"] = torch.device("cpu")
    values = [_inner(value) for value in args]
    if here and func is torch.ops.aten.div.Tensor and not isinstance(args[1], DeviceTensor):
        # As on a GPU: by a number on the host torch multiplies with its reciprocal, in float32.
        func, values[1] = torch.ops.aten.mul.Tensor, float(torch.ones(()) / torch.tensor(float(args[1])))
    result = func(*values, **inner)
    if device is not None:
        there = device.type in (DEVICE.type, _DISPATCHED.type)
    else:
        there = isinstance(args[0], DeviceTensor) if func in _COPIES else bool(here)
    return _placed(result, {id(tensor.held): tensor for tensor in here}) if there else result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _inner(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.held
    return [_inner(each) for each in value] if isinstance(value, tuple | list) else value


def _placed(result: Any, known: dict[int, DeviceTensor]) -> Any:
    """On the device; an operation in place gives the tensor that it was called with."""
    if isinstance(result, Tensor):
        return known[id(result)] if id(result) in known else DeviceTensor(result)
    return tuple(_placed(each, known) for each in result) if isinstance(result, tuple | list) else result
