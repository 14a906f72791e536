"""Every function of AITER that is called here, with the names of the arguments, and whether an installed release fits.

Functions of AITER's C++ extensions are called by position, for some of their bindings have no names.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """A function as it is called here: some arguments by position, some by name; each stands for all calls of it."""

    module: str
    name: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    """Of the keywords, those that the function must ask whether they are None: others it would replace with its own."""

    @property
    def path(self) -> str:
        """The source file inside the package's parent folder, with slashes."""
        return self.module.replace(".", "/") + ".py"

    def fault(self, signature: inspect.Signature | None) -> str:
        """Why the call does not fit this signature, naming the parameter; empty where it does. None: no function."""
        where = f"{self.module}.{self.name}"
        if signature is None:
            return f"{where} does not exist"
        known = tuple(signature.parameters)
        for place, wanted in enumerate(self.positional):
            if place >= len(known) or known[place] != wanted:
                found = known[place] if place < len(known) else "nothing"
                return f"{where}: parameter {place + 1} is {found}, expected {wanted}"
        unknown = [wanted for wanted in self.keywords if wanted not in known]
        if unknown:
            return f"{where} has no parameter {unknown[0]}"
        passed = {*self.positional, *self.keywords}
        needed = [each.name for each in signature.parameters.values() if each.default is each.empty]
        missing = [each for each in needed if each not in passed]
        return f"{where} needs {missing[0]}, which is not passed" if missing else ""


_CALLS = (
    Call(
        "aiter.mla",
        "mla_decode_fwd",
        ("q", "kv_buffer", "o", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens", "max_seqlen_q"),
        ("sm_scale", "num_kv_splits", "num_kv_splits_indptr"),
        # Old releases replace it with a tensor out of a cache, which a device graph would outlive.
        ("num_kv_splits_indptr",),
    ),
    Call(
        "aiter.ops.topk",
        "biased_grouped_topk",
        (
            "gating_output",
            "correction_bias",
            "topk_weights",
            "topk_ids",
            "num_expert_group",
            "topk_group",
            "need_renorm",
        ),
        ("routed_scaling_factor",),
    ),
    Call("aiter.ops.rmsnorm", "rms_norm", ("input", "weight", "epsilon")),
    Call("aiter.ops.quant", "per_token_quant_hip", ("x",), ("quant_dtype",)),
    Call("aiter.ops.activation", "silu_and_mul", ("out", "input")),
    Call("aiter.ops.gemm_op_a8w8", "gemm_a8w8", ("XQ", "WQ", "x_scale", "w_scale"), ("dtype", "splitK")),
    Call(
        "aiter.fused_moe",
        "fused_moe",
        ("hidden_states", "w1", "w2", "topk_weight", "topk_ids"),
        ("expert_mask", "activation", "quant_type", "w1_scale", "w2_scale", "a1_scale", "dtype"),
    ),
    Call("aiter.ops.shuffle", "shuffle_weight", ("x",), ("layout",)),
    Call("aiter.ops.shuffle", "pack_int8_to_packed_int4", ("x_shuf_i8",)),
    Call("aiter.ops.shuffle", "shuffle_scale_for_int4", ("scale",), ("group_size",)),
)
CALLS = {call.name: call for call in _CALLS}
"""By the function's name."""

OPERATION_CALLS = {
    "absorb": (),
    "write_kv": (),
    "mla_attention": ("mla_decode_fwd",),
    "gate": ("biased_grouped_topk",),
    "rms_norm": ("rms_norm",),
    "rms_norm_quantize": ("rms_norm", "per_token_quant_hip"),
    "quantize": ("per_token_quant_hip",),
    "silu_mul": ("silu_and_mul",),
    "linear": ("gemm_a8w8",),
    "prepare": ("shuffle_weight",),
    "experts": ("fused_moe",),
}
"""Which functions an operation of the protocol calls; what INT4 matrices need besides is `INT4_CALLS`."""
INT4_CALLS = ("pack_int8_to_packed_int4", "shuffle_scale_for_int4")
"""Of releases since the middle of 2026."""


def read_signature(source: str, name: str) -> inspect.Signature | None:
    """The parameters of a function at the top level of a Python source, without running it; None where there is none.

    Defaults that are no literals are given as their source."""
    node = _function(source, name)
    return None if node is None else _signature(node.args)


def replaced(source: str, name: str, parameters: Iterable[str]) -> list[str]:
    """Those parameters that a function never compares with None."""
    node = _function(source, name)
    asked = {
        part.left.id
        for part in ([] if node is None else ast.walk(node))
        if isinstance(part, ast.Compare)
        and isinstance(part.left, ast.Name)
        and isinstance(part.ops[0], ast.Is | ast.IsNot)
    }
    return [each for each in parameters if each not in asked]


def _function(source: str, name: str) -> ast.FunctionDef | None:
    found = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    return next(found, None)


def _signature(arguments: ast.arguments) -> inspect.Signature:
    kind = inspect.Parameter
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [kind.empty] * (len(plain) - len(arguments.defaults)) + [_value(each) for each in arguments.defaults]
    made = [
        kind(each.arg, kind.POSITIONAL_OR_KEYWORD, default=default)
        for each, default in zip(plain, defaults, strict=True)
    ]
    if arguments.vararg is not None:
        made.append(kind(arguments.vararg.arg, kind.VAR_POSITIONAL))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        made.append(kind(each.arg, kind.KEYWORD_ONLY, default=kind.empty if default is None else _value(default)))
    return inspect.Signature(made)


def _value(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


Source = Callable[[str], str | None]
"""Gives the text of a file of the package by its path, such as "aiter/mla.py", or None where there is no such file."""


def call_fault(name: str, source: Source) -> str:
    """Why the call of this name does not fit the sources of a release; empty where it does."""
    call = CALLS[name]
    text = source(call.path)
    fault = call.fault(None if text is None else read_signature(text, name))
    if fault or text is None:
        return fault
    unasked = replaced(text, name, call.optional)
    return f"{call.module}.{name} replaces {unasked[0]} with its own" if unasked else ""


__all__ = ["CALLS", "INT4_CALLS", "OPERATION_CALLS", "Call", "Source", "call_fault", "read_signature", "replaced"]
