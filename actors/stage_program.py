"""What a stage program is made of: its stages, their buffers and channels, the layers it computes.

A `Stage` is one thing one actor does for one layer and one micro-batch. A `StageProgram` is the order of all stages of
a step for every role. The same object is checked (`program_check`), simulated (`simulate`), drawn (`trace`) and run.

Buffers are named `value.micro_batch` ("hidden.0"), private to an actor. What crosses from actor to actor goes through
channels: "dispatch" brings tokens to their experts, "combine" brings the results back; with tensor-parallel attention
"heads" and "logits" bring all actors what each has computed of every row. All are first in, first out between two
actors, and a stage that receives waits for all actors that send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

StageKind = Literal[
    "embed",
    "attention",
    "own_heads",
    "output",
    "dense",
    "gate",
    "dispatch",
    "shared",
    "experts",
    "own_experts",
    "combine",
    "head",
    "own_logits",
    "logits",
    "sample",
]
Channel = Literal["", "dispatch", "combine", "heads", "logits"]
CHANNELS: tuple[Channel, ...] = get_args(Channel)[1:]

Attention = Literal["data_parallel", "tensor_parallel"]
"""data_parallel: a sequence is one actor's, with all heads. tensor_parallel: every actor has all rows, and computes a
part of the heads, of the logits and of the experts' outputs."""
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)


class ProgramError(ValueError):
    """A stage program that cannot be built, or would not compute the model; names the stage."""


class Layers(Protocol):
    """What a program depends on, named as in config.json; `ModelConfig` has it."""

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def first_k_dense_replace(self) -> int: ...


@dataclass(frozen=True)
class LayerPlan:
    """num_hidden_layers in all, of which the first `first_k_dense_replace` have a dense MLP, the others experts."""

    num_hidden_layers: int
    first_k_dense_replace: int

    def __post_init__(self) -> None:
        if self.num_hidden_layers < 1:
            raise ProgramError(f"num_hidden_layers: {self.num_hidden_layers} is below 1")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ProgramError(
                f"first_k_dense_replace: {self.first_k_dense_replace} is not 0..{self.num_hidden_layers}"
            )


@dataclass(frozen=True)
class Signature:
    """The values that a kind of stage takes and makes, in order, and the channels it receives from and sends to."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    receives: Channel = ""
    sends: Channel = ""


# A gate's routing holds the normed input, the chosen experts with their weights and the activations in the experts'
# format; sent is what was dispatched where, by which the results are put back in order. The shared expert comes
# between dispatch and experts, so that it is computed while the tokens travel. Kinds that begin with `own` compute an
# actor's part of every row: with all rows everywhere nothing is dispatched.
SIGNATURES: Mapping[StageKind, Signature] = {
    "embed": Signature((), ("hidden",)),
    "attention": Signature(("hidden",), ("hidden",)),
    "dense": Signature(("hidden",), ("hidden",)),
    "gate": Signature(("hidden",), ("routing",)),
    "dispatch": Signature(("routing",), ("sent",), sends="dispatch"),
    "shared": Signature(("routing",), ("shared",)),
    "experts": Signature((), (), receives="dispatch", sends="combine"),
    "combine": Signature(("hidden", "routing", "sent", "shared"), ("hidden",), receives="combine"),
    "head": Signature(("hidden",), ("logits",)),
    "sample": Signature(("logits",), ("tokens",)),
    "own_heads": Signature(("hidden",), (), sends="heads"),
    "output": Signature(("hidden",), ("hidden",), receives="heads"),
    "own_experts": Signature(("routing",), ("sent",), sends="combine"),
    "own_logits": Signature(("hidden",), (), sends="logits"),
    "logits": Signature(("hidden",), ("logits",), receives="logits"),
}


@dataclass(frozen=True)
class Stage:
    """One actor's work for one layer (-1 outside the layers) and one micro-batch.

    reads and writes: buffers, in the order of its kind's signature. receives and sends: channels, "" for none.
    """

    kind: StageKind
    layer: int
    micro_batch: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    receives: Channel = ""
    sends: Channel = ""

    @property
    def name(self) -> str:
        """Unique in a program, as it stands in traces: `kind.layer.micro_batch`, or `kind.micro_batch`."""
        place = f"{self.layer}." if self.layer >= 0 else ""
        return f"{self.kind}.{place}{self.micro_batch}"


@dataclass(frozen=True)
class StageProgram:
    """All stages of one step. stages: for each role the order in which its actors run theirs.

    name: what step plans call it. layers: the model that it computes, for `check`.
    """

    name: str
    layers: LayerPlan
    micro_batches: int
    stages: Mapping[str, tuple[Stage, ...]]
    attention: Attention = "data_parallel"


def make_stage(kind: StageKind, layer: int, micro_batch: int) -> Stage:
    """A stage with the buffers and channels of its kind."""
    signature = SIGNATURES[kind]
    return Stage(
        kind=kind,
        layer=layer,
        micro_batch=micro_batch,
        reads=tuple(f"{value}.{micro_batch}" for value in signature.reads),
        writes=tuple(f"{value}.{micro_batch}" for value in signature.writes),
        receives=signature.receives,
        sends=signature.sends,
    )
