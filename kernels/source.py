"""A part of a backend: operations of the protocol, of one origin, that a composed backend chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .protocol import ExpertMatrix, GateConfig, LinearWeight

LAYOUTS = (frozenset({"prepare", "experts"}), frozenset({"absorb", "write_kv", "mla_attention"}))
"""Operations that come from one source, for one reads what another has laid out."""


@dataclass(frozen=True)
class LinearShape:
    """One linear's weight [rows, columns]: of `Kernels.linear`, or, where both halves of an MLP are integers, `mlp`."""

    kind: type[LinearWeight]
    rows: int
    columns: int


@dataclass(frozen=True)
class KernelShapes:
    """What a model asks of kernels on one shard.

    heads: that one shard attends with. experts: of all that the gate chooses from; local_experts: most of them that
    one shard holds. q_lora_rank: None where queries are one linear. expert_kinds: of the routed experts' matrices in
    memory. linears: every weight that `linear` and `mlp` multiply, each shape once. kv_dtype: of KV pages. page_size:
    tokens of one.
    """

    hidden_size: int
    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_intermediate_size: int
    experts: int
    local_experts: int
    gate: GateConfig
    expert_kinds: tuple[type[ExpertMatrix], ...]
    linears: tuple[LinearShape, ...]
    kv_dtype: torch.dtype
    page_size: int


@dataclass(frozen=True)
class Promise:
    """How a source's operation stands to the protocol.

    relative_error: largest difference from the reference that is right, in parts of the largest expected entry, where
    it is more than the protocol allows; 0 else. reservation: what of the protocol it does not keep, such as batch
    invariance; empty where it keeps all. With one, the operation is run only where a user names its source for it.
    """

    relative_error: float = 0.0
    reservation: str = ""


class KernelSource(Protocol):
    """Operations of one origin, such as a library. Asking a source needs no GPU, and not the library that runs it.

    name: in configuration and in the precision plan. operations: the names of those of `Kernels` that it has for some
    shapes; where one of `LAYOUTS` is among them, all of it is. kernels: what has them as methods, with the signatures,
    shapes and dtypes of `Kernels`. What they launch is on torch's current stream, without waiting for the device, so
    that a device graph records it. leaves_out: as `AheadKernels.leaves_out`, of those of `write_kv` and `experts` that
    it has. splits_floats: as `Kernels.splits_floats`.
    """

    name: str
    operations: frozenset[str]
    leaves_out: bool
    splits_floats: bool

    @property
    def kernels(self) -> object: ...

    def refusal(self, operation: str, kind: type | None, shapes: KernelShapes) -> str:
        """Why it does not run the operation for a model of these shapes: which field or package is wrong, and what
        would fit; empty where it does.

        kind: of the weights, for `prepare` and `experts` (of `shapes.expert_kinds`) and for `linear` and `mlp` (of
        `shapes.linears`, all shapes of that kind count); None for the others. An operation may thus come from several
        sources, by the kind of its weights.
        """
        ...

    def promise(self, operation: str) -> Promise:
        """Of one of `operations`."""
        ...
