"""What AITER has for a model, and how it stands to the protocol: asked without a GPU, and without the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..protocol import Int4Matrix, Int8Weight, Kernels
from ..source import KernelShapes, Promise
from .attention import LATENT, ROPE
from .backend import GATE_GROUPS, INNER_UNIT, MAX_TOP_K, AiterKernels
from .calls import INT4_CALLS, OPERATION_CALLS
from .experts import UNIT
from .package import installed_call_fault, installed_folder, package_fault

TARGET = "gfx942"

_BFLOAT16 = "rounds its input and result to bfloat16"
_PROMISES = {
    # Queries, entries, shares and results in bfloat16: within what the protocol allows such pages.
    "absorb": Promise(),
    "write_kv": Promise(),
    "mla_attention": Promise(),
    "gate": Promise(
        reservation="of experts with equal scores it takes any, where the protocol wants the lower id, and a weight is "
        "(score + bias) - bias, half a unit in the last place of score + bias away from the score"
    ),
    "rms_norm": Promise(1e-2, _BFLOAT16),
    "rms_norm_quantize": Promise(1e-2, f"{_BFLOAT16}, so INT8 codes differ by one from the reference's"),
    "quantize": Promise(1e-2, "rounds its input to bfloat16, so INT8 codes differ by one from the reference's"),
    "silu_mul": Promise(2e-2, _BFLOAT16),
    "linear": Promise(1e-2, "rounds an INT8 product's result to bfloat16, where the protocol wants the exact sum"),
    "prepare": Promise(),
    # FP8: a hidden value on the other side of a rounding is 1/16 away; 0.069 was the most of 300 random layers.
    "experts": Promise(
        1e-1,
        "rounds hidden values and results to bfloat16, and above 32 pairs its kernel may add slices of the "
        "intermediate size atomically in bfloat16, so bits depend on the batch and on chance",
    ),
}
assert _PROMISES.keys() == OPERATION_CALLS.keys()


class AiterSource:
    """A `KernelSource`. base: kernels of the same device ("meta" to ask alone) that AITER leans on. target: the GPU's
    architecture, such as "gfx942". kernels: those on `base` by default, over the installed release; others are asked
    for shapes alone."""

    name = "aiter"
    operations = frozenset(_PROMISES)
    leaves_out = True
    splits_floats = False

    def __init__(self, base: Kernels, target: str, kernels: AiterKernels | None = None) -> None:
        self._target, self._installed = target, kernels is None
        self.kernels = AiterKernels(base) if kernels is None else kernels

    def promise(self, operation: str) -> Promise:
        return _PROMISES[operation]

    def refusal(self, operation: str, kind: type | None, shapes: KernelShapes) -> str:
        if operation not in self.operations:
            return f"operation: AITER has no {operation}"
        if self._target != TARGET:
            return f"target: is {self._target}, expected {TARGET}, for which AITER's layouts and FP8 are prepared here"
        fault = _shape_fault(operation, kind, shapes)
        return fault or (self._installation_fault(operation, kind) if self._installed else "")

    def _installation_fault(self, operation: str, kind: type | None) -> str:
        folder = installed_folder()
        fault = package_fault(folder)
        if fault or folder is None:
            return fault
        return release_fault(operation, kind, folder)


def release_fault(operation: str, kind: type | None, folder: Path) -> str:
    """Which parameter of which function in the release in this folder an operation's calls do not fit; empty: none."""
    names = OPERATION_CALLS[operation] + (INT4_CALLS if kind is Int4Matrix else ())
    return next(filter(None, (installed_call_fault(name, folder) for name in names)), "")


def _shape_fault(operation: str, kind: type | None, shapes: KernelShapes) -> str:
    check = _FAULTS.get(operation)
    return "" if check is None else check(kind, shapes)


def _attention_fault(kind: type | None, shapes: KernelShapes) -> str:
    if (shapes.kv_lora_rank, shapes.qk_rope_head_dim) != (LATENT, ROPE):
        return (
            f"kv_lora_rank and qk_rope_head_dim: are {shapes.kv_lora_rank} and {shapes.qk_rope_head_dim}, expected "
            f"{LATENT} and {ROPE}, the only ones that AITER's MLA kernels are assembled for"
        )
    if shapes.kv_dtype != torch.bfloat16:
        return (
            f"kv_dtype: is {shapes.kv_dtype}, expected torch.bfloat16 (bf16): AITER's 8-bit pages have one scale for "
            "all and 8-bit rotated keys, which cost several times the accuracy of flyray's"
        )
    return ""


def _gate_fault(kind: type | None, shapes: KernelShapes) -> str:
    if shapes.gate.n_group not in GATE_GROUPS:
        return (
            f"n_group: is {shapes.gate.n_group}, expected 1 or 8: AITER ranks 2 or 4 groups by a part of their experts"
        )
    if shapes.gate.top_k > MAX_TOP_K:
        return f"top_k: is {shapes.gate.top_k}, expected at most {MAX_TOP_K}, a lane of a wave each"
    return ""


def _linear_fault(kind: type | None, shapes: KernelShapes) -> str:
    if kind is not Int8Weight:
        return f"weights: are {_name(kind)}, expected Int8Weight: others would be rounded to bfloat16 or unpacked first"
    odd = [each.columns for each in shapes.linears if each.kind is Int8Weight and each.columns % INNER_UNIT]
    return f"columns: a linear has {odd[0]}, expected a multiple of {INNER_UNIT}" if odd else ""


def _experts_fault(kind: type | None, shapes: KernelShapes) -> str:
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(shapes, name) % UNIT:
            return f"{name}: is {getattr(shapes, name)}, expected a multiple of {UNIT}, of which AITER's tiles are"
    return ""


_FAULTS: dict[str, Callable[[type | None, KernelShapes], str]] = {
    "absorb": _attention_fault,
    "write_kv": _attention_fault,
    "mla_attention": _attention_fault,
    "gate": _gate_fault,
    "linear": _linear_fault,
    "prepare": _experts_fault,
    "experts": _experts_fault,
}


def _name(kind: type | None) -> str:
    return "unknown" if kind is None else kind.__name__


__all__ = ["TARGET", "AiterSource", "release_fault"]
