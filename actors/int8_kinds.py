"""The kinds of bfloat16 weights that may become INT8 while they are loaded."""

from __future__ import annotations

from collections.abc import Collection

INT8_KINDS = {"attention": "attention", "shared": "shared experts", "dense": "dense MLP", "head": "lm_head"}
"""The words of `EngineConfig.int8_weights`, and the rows of the precision plan that they stand for. Of attention,
kv_b_proj stays: it is split and transposed when loaded, so that its rows' scales would become columns' scales."""


def check_int8_kinds(kinds: Collection[str]) -> None:
    """Raises ValueError for a kind that there is not, or one named twice."""
    for kind in kinds:
        if kind not in INT8_KINDS:
            raise ValueError(f"int8_weights: {kind!r} is unknown; known are {', '.join(INT8_KINDS)}")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"int8_weights: {', '.join(kinds)} names a kind twice")


def linear_kind(module: str) -> str:
    """The kind of a linear that may become INT8, named without the prefix."""
    if module == "lm_head":
        return "head"
    if ".self_attn." in module:
        return "attention"
    return "shared" if ".shared_experts." in module else "dense"
