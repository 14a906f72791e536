"""A batch: what was ordered, how far it is, and which step may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

FINAL = ("completed", "failed", "expired", "cancelled")

_NEXT = {
    "validating": ("in_progress", "failed", "cancelled", "expired"),
    "in_progress": ("finalizing",),
    "finalizing": FINAL,
}


@dataclass(frozen=True)
class BatchOrder:
    """What a client asked for; never changes. model: the served model's name. Times are Unix times in seconds."""

    id: str
    created_at: int
    expires_at: int
    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None
    model: str


@dataclass(frozen=True)
class BatchFault:
    """Why a batch failed. line: of the input, from 1, or None; param: the field at fault, or None."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True)
class BatchUsage:
    """Tokens of all answers."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def plus(self, usage: Mapping[str, Any]) -> BatchUsage:
        """With the "usage" object of one more answer."""
        prompt, completion = usage.get("prompt_tokens_details") or {}, usage.get("completion_tokens_details") or {}
        return BatchUsage(
            self.input + usage.get("prompt_tokens", 0),
            self.cached + prompt.get("cached_tokens", 0),
            self.output + usage.get("completion_tokens", 0),
            self.reasoning + completion.get("reasoning_tokens", 0),
        )

    def body(self) -> dict[str, Any]:
        return {
            "input_tokens": self.input,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": self.output,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.input + self.output,
        }


@dataclass(frozen=True)
class BatchState:
    """How far a batch is; only its runner writes it.

    status: OpenAI's but "cancelling", which is a batch that somebody asked to cancel and that has not ended. outcome:
    the status that "finalizing" leads to. completed and failed: lines answered well, and not. output_file and
    error_file: ids, chosen when it begins to finalize, "" at the end for a file that would be empty.
    """

    status: str = "validating"
    outcome: str = ""
    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    ended_at: int | None = None
    output_file: str = ""
    error_file: str = ""
    faults: tuple[BatchFault, ...] = ()
    usage: BatchUsage = field(default_factory=BatchUsage)

    @property
    def final(self) -> bool:
        return self.status in FINAL

    @property
    def cancellable(self) -> bool:
        return self.status in ("validating", "in_progress")

    def to(self, status: str, **changes: Any) -> BatchState:
        """The next state. Raises ValueError for a step that a batch cannot take."""
        if status not in _NEXT.get(self.status, ()) or (self.status == "finalizing" and status != self.outcome):
            raise ValueError(f"a batch that is {self.status} {self.outcome} cannot become {status}")
        return replace(self, status=status, **changes)

    def record(self) -> dict[str, Any]:
        """For the disk."""
        return asdict(self)

    @staticmethod
    def of_record(content: dict[str, Any]) -> BatchState:
        """What `record` gave."""
        faults = tuple(BatchFault(**fault) for fault in content["faults"])
        return BatchState(**content | {"faults": faults, "usage": BatchUsage(**content["usage"])})


def batch_body(order: BatchOrder, state: BatchState, cancelling_at: int | None) -> dict[str, Any]:
    """OpenAI's "batch" object. cancelling_at: when somebody asked to cancel it, or None."""
    cancelling = cancelling_at is not None and not state.final
    ended = {f"{status}_at": state.ended_at if state.status == status else None for status in FINAL}
    files = (state.output_file or None, state.error_file or None) if state.final else (None, None)
    errors = {"object": "list", "data": [asdict(fault) for fault in state.faults]} if state.faults else None
    return {
        "id": order.id,
        "object": "batch",
        "endpoint": order.endpoint,
        "model": order.model,
        "errors": errors,
        "input_file_id": order.input_file_id,
        "completion_window": order.completion_window,
        "status": "cancelling" if cancelling else state.status,
        "output_file_id": files[0],
        "error_file_id": files[1],
        "created_at": order.created_at,
        "in_progress_at": state.in_progress_at,
        "expires_at": order.expires_at,
        "finalizing_at": state.finalizing_at,
        "cancelling_at": cancelling_at if cancelling or state.status == "cancelled" else None,
        **ended,
        "request_counts": {"total": state.total, "completed": state.completed, "failed": state.failed},
        "usage": state.usage.body() if state.final else None,
        "metadata": order.metadata,
    }
