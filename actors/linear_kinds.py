"""The kinds of bfloat16 weights that may become INT8 or INT4 while they are loaded."""

from __future__ import annotations

from collections.abc import Collection

LINEAR_KINDS = {"attention": "attention", "shared": "shared experts", "dense": "dense MLP", "head": "lm_head"}
"""The words of `EngineConfig.int8_weights` and `int4_weights`, and the rows of the precision plan that they stand for.
Of attention, kv_b_proj stays: it is split and transposed when loaded, so that its rows' scales would become columns'
scales."""


def check_linear_kinds(int8_weights: Collection[str], int4_weights: Collection[str]) -> None:
    """Raises ValueError for a kind that there is not, one named twice, or one that is to be both."""
    for field, kinds in (("int8_weights", int8_weights), ("int4_weights", int4_weights)):
        for kind in kinds:
            if kind not in LINEAR_KINDS:
                raise ValueError(f"{field}: {kind!r} is unknown; known are {', '.join(LINEAR_KINDS)}")
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"{field}: {', '.join(kinds)} names a kind twice")
    for kind in int4_weights:
        if kind in int8_weights:
            raise ValueError(f"int4_weights: {kind!r} is in int8_weights too; a kind is loaded as one of them")


def linear_kind(module: str) -> str:
    """The kind of a linear that may become INT8 or INT4, named without the prefix."""
    if module == "lm_head":
        return "head"
    if ".self_attn." in module:
        return "attention"
    return "shared" if ".shared_experts." in module else "dense"
