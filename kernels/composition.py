"""Which source runs each operation of a composed backend, and why those asked before it do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .protocol import Int4Weight, Int8Weight, Kernels
from .source import LAYOUTS, KernelShapes, KernelSource, Promise

SourceOrder = Mapping[str, Sequence[str]]
"""Operation -> names of the sources that may run it, the first that does not refuse runs it. Without an entry: all, in
the backend's order, but those with a reservation."""

_ALONE = (
    "take_rows", "rms_norm", "rms_norm_quantize", "linear", "head_linear", "mlp", "gate", "quantize", "silu_mul",
    "combine",
)  # fmt: skip
OPERATIONS = frozenset(_ALONE).union(*LAYOUTS)
"""Those of `Kernels` that sources are chosen for. Graphs and sampling are the base's own."""


class SourceError(ValueError):
    """No source that may run an operation runs it; the message names the operation and each one's reason."""


@dataclass(frozen=True)
class Choice:
    """source: runs the operation, for weights of `kind` where it has any. passed_over: sources that come first in the
    order, each with its reason. promise: the source's."""

    operation: str
    kind: type | None
    source: str
    passed_over: tuple[str, ...]
    promise: Promise

    @property
    def label(self) -> str:
        """Such as experts[Int4Matrix]."""
        return operation_label(self.operation, self.kind)


@dataclass(frozen=True)
class KernelPlan:
    """What runs a model of these shapes; made once, and followed by every shard. Operations on weights of other kinds
    are the base's."""

    shapes: KernelShapes
    choices: tuple[Choice, ...]

    def lines(self) -> tuple[str, ...]:
        """One for all operations that come from one source for the same reasons."""
        alike: dict[tuple[str, tuple[str, ...], Promise], list[str]] = {}
        for choice in self.choices:
            alike.setdefault((choice.source, choice.passed_over, choice.promise), []).append(choice.label)
        return tuple(
            "; ".join([f"{source} runs {', '.join(labels)}{_within(promise)}", *passed_over])
            for (source, passed_over, promise), labels in alike.items()
        )


class BackendSource:
    """A whole backend as a source: it refuses nothing that its KV pages fit."""

    operations = OPERATIONS

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.name, self.splits_floats = kernels, kernels.name, kernels.splits_floats
        self.leaves_out: bool = getattr(kernels, "leaves_out", False)

    def refusal(self, operation: str, kind: type | None, shapes: KernelShapes) -> str:
        """Of the operations on KV pages of another dtype."""
        if operation in LAYOUTS[1] and shapes.kv_dtype != self.kernels.kv_dtype:
            return f"kv_dtype is {shapes.kv_dtype}, it keeps {self.kernels.kv_dtype}"
        return ""

    def promise(self, operation: str) -> Promise:
        return Promise()


def operation_label(operation: str, kind: type | None) -> str:
    """Such as experts[Int4Matrix]; weights in floats are not told."""
    return operation if kind in (None, Tensor) else f"{operation}[{kind.__name__}]"


def choose(sources: Sequence[KernelSource], shapes: KernelShapes, orders: SourceOrder) -> KernelPlan:
    """sources: in the backend's order. Raises SourceError; ValueError for an operation or source that there is not, and
    for two orders of operations that share a layout."""
    known = {source.name: source for source in sources}
    for operation, names in orders.items():
        if operation not in OPERATIONS:
            raise ValueError(f"kernels: {operation!r} is no operation; {', '.join(sorted(OPERATIONS))} are")
        if not names:
            raise ValueError(f"kernels.{operation}: names no source; {', '.join(known)} are")
        for name in names:
            if name not in known:
                raise ValueError(f"kernels.{operation}: {name!r} is no source; {', '.join(known)} are")
    units = [*LAYOUTS, *(frozenset([operation]) for operation in _ALONE)]
    return KernelPlan(shapes, tuple(choice for unit in units for choice in _choices(unit, known, shapes, orders)))


def check_plan(sources: Sequence[KernelSource], plan: KernelPlan) -> None:
    """Raises SourceError where a chosen source refuses in this process what it did not refuse where the plan was
    made."""
    known = {source.name: source for source in sources}
    for choice in plan.choices:
        reason = known[choice.source].refusal(choice.operation, choice.kind, plan.shapes)
        if reason:
            raise SourceError(
                f"the plan has {choice.label} run by {choice.source}, which here says: {reason}; "
                "all nodes of an engine need the same packages and GPUs"
            )


def _choices(
    unit: frozenset[str], known: Mapping[str, KernelSource], shapes: KernelShapes, orders: SourceOrder
) -> Iterator[Choice]:
    members = sorted(unit)
    named = {tuple(orders[operation]): operation for operation in members if operation in orders}
    if len(named) > 1:
        raise ValueError(f"kernels: {', '.join(named.values())} share a layout, and so one order of sources")
    for kind in _kinds(unit, shapes):
        passed_over = []
        for name in next(iter(named), known):
            source = known[name]
            if not named and not unit <= source.operations:
                continue  # A library of other things is not worth a word.
            reason = _reason(source, members, kind, shapes) or ("" if named else _reservation(source, members))
            if not reason:
                choice = (name, tuple(passed_over))
                yield from (Choice(each, kind, *choice, source.promise(each)) for each in members)
                break
            passed_over.append(f"{name} does not: {reason}")
        else:
            labels = ", ".join(operation_label(each, kind) for each in members)
            raise SourceError(f"kernels: no source runs {labels}: {'; '.join(passed_over)}")


def _kinds(unit: frozenset[str], shapes: KernelShapes) -> Sequence[type | None]:
    """The kinds of weights that the model has for these operations."""
    if "experts" in unit:
        return shapes.expert_kinds
    kinds = {linear.kind for linear in shapes.linears}
    if "linear" in unit:
        return [kind for kind in (Tensor, Int8Weight, Int4Weight) if kind in kinds]
    if "mlp" in unit:
        return [kind for kind in (Int8Weight, Int4Weight) if kind in kinds]
    return (None,)


def _reason(source: KernelSource, members: Sequence[str], kind: type | None, shapes: KernelShapes) -> str:
    for operation in members:
        reason = source.refusal(operation, kind, shapes) if operation in source.operations else f"has no {operation}"
        if reason:
            return reason
    return ""


def _reservation(source: KernelSource, members: Sequence[str]) -> str:
    return next((reason for each in members if (reason := source.promise(each).reservation)), "")


def _within(promise: Promise) -> str:
    said = [promise.reservation] if promise.reservation else []
    if promise.relative_error:
        said.append(f"within {promise.relative_error:g} of the reference")
    return f" ({'; '.join(said)})" if said else ""


__all__ = [
    "OPERATIONS",
    "BackendSource",
    "Choice",
    "KernelPlan",
    "SourceError",
    "SourceOrder",
    "check_plan",
    "operation_label",
    "choose",
]
