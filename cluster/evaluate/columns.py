"""Measures checkpoints through the engine: perplexity of held-out text, and the share of tasks done right.

A column is one checkpoint in one precision; all columns see the same text and tasks, so they can be compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...actors.engine_config import EngineConfig
from ..crew import work_through
from ..engine_session import EngineSession, engine_session
from ..front.requests import ChatRequest, parse
from .perplexity import Document, TextScore, cut_windows, score_text
from .score import Task

ALL = "all"
SPLIT = "heldout-"  # what a row about one kind of held-out tasks begins with
PRIORITY = 1


@dataclass(frozen=True)
class Column:
    """A checkpoint in one precision. precision: as in `EngineConfig`. native: what the others are compared with."""

    label: str
    path: Path
    precision: str


@dataclass(frozen=True)
class Material:
    """What is measured. window: most tokens scored at once. max_tokens: of a task's answer, thinking included."""

    documents: tuple[Document, ...]
    tasks: tuple[Task, ...]
    window: int
    max_tokens: int
    concurrency: int


@dataclass(frozen=True)
class TaskScore:
    """How many tasks of one kind were answered right."""

    name: str
    right: int
    total: int


@dataclass(frozen=True)
class ColumnScore:
    """A column's result. text: None when there was none to score. answer_tokens: written by the model for the tasks."""

    label: str
    text: TextScore | None
    tasks: tuple[TaskScore, ...]
    answer_tokens: int


Report = Callable[[str, int], None]
"""Called with a column's label and how many windows and tasks were finished since the last call."""


def _ignore(label: str, count: int) -> None:
    """No report."""


async def evaluate(
    columns: Sequence[Column], material: Material, template: EngineConfig, *, lanes: int = 1, report: Report = _ignore
) -> list[ColumnScore]:
    """Measures every column with an engine of its own, `lanes` engines at a time; Ray must be initialized.

    template: the engines' settings; path, name and precision are the columns'. Raises what starting an engine raises,
    ScoringError, and EngineUnavailable when an engine fails.
    """
    scores: dict[str, ColumnScore] = {}

    async def measure(column: Column) -> None:
        config = replace(template, model_path=str(column.path), precision=column.precision, name=f"eval-{column.label}")
        async with engine_session(config, column.label) as session:
            scores[column.label] = await measure_engine(session, column.label, material, report)

    await work_through(columns, measure, lanes)
    return [scores[column.label] for column in columns]


async def measure_engine(
    session: EngineSession, label: str, material: Material, report: Report = _ignore
) -> ColumnScore:
    """Measures one running engine."""
    text = None
    if material.documents:
        length = min(material.window, session.context_length)
        windows = cut_windows(session.tokenizer, material.documents, length)
        text = await score_text(
            session.client, windows, concurrency=material.concurrency, on_window=lambda _: report(label, 1)
        )
    right: list[bool] = [False] * len(material.tasks)
    tokens = Counter[str]()

    async def answer(index: int) -> None:
        task = material.tasks[index]
        request = parse(task.request(session.service.model_name, material.max_tokens), ChatRequest)
        body = await session.service.chat_response(request, PRIORITY)
        right[index] = task.is_right(body["choices"][0]["message"])
        tokens["answers"] += body["usage"]["completion_tokens"]
        report(label, 1)

    await work_through(range(len(material.tasks)), answer, material.concurrency)
    return ColumnScore(label, text, task_scores(material.tasks, right), tokens["answers"])


def task_scores(tasks: Sequence[Task], right: Sequence[bool]) -> tuple[TaskScore, ...]:
    """A score for each family, then for each kind of held-out tasks if there are several, then for all."""
    names = [[task.family, f"{SPLIT}{task.split}" if task.split else "", ALL] for task in tasks]
    totals = Counter(name for row in names for name in row if name)
    rights = Counter(name for row, ok in zip(names, right, strict=True) for name in row if name and ok)
    families = [task.family for task in tasks]
    splits = [name for name in totals if name.startswith(SPLIT) and name not in families]
    order = [*dict.fromkeys(families), *(splits if len(splits) > 1 else []), *([ALL] if tasks else [])]
    return tuple(TaskScore(name, rights[name], totals[name]) for name in dict.fromkeys(order))
