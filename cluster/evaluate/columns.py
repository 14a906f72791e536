"""Measures checkpoints through the engine: perplexity of held-out text, and the share of tasks done right.

A column is one checkpoint in one precision; all columns see the same text and tasks, so they can be compared. One of
them may be the reference: it keeps its next-token distributions, and the others are compared with these.
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
from ..tokenizer import Tokenizer
from .distributions import Distributions, Shelf
from .perplexity import Document, TextScore, Window, cut_windows, score_text
from .score import Task

ALL = "all"
SPLIT = "heldout-"  # what a row about one kind of held-out tasks begins with
PRIORITY = 1


@dataclass(frozen=True)
class Column:
    """A checkpoint in one precision and with KV pages of one dtype, as in `EngineConfig`.

    reference: label of the column whose next-token distributions this one is compared with; its own, if it is that
    column; "": it is not compared. bytes: of its tensors on disk; 0 if it is made in memory only.
    """

    label: str
    path: Path
    precision: str
    reference: str = ""
    bytes: int = 0
    kv_dtype: str = "auto"

    @property
    def is_reference(self) -> bool:
        return self.reference == self.label

    def with_kv_dtypes(self, kv_dtypes: Sequence[str]) -> list[Column]:
        """This column once with each; a reference with "auto", too, for the others to be compared with."""
        wanted = dict.fromkeys(("auto", *kv_dtypes) if self.is_reference else kv_dtypes)
        labels = {kv_dtype: self.label if kv_dtype == "auto" else f"{self.label}+{kv_dtype}" for kv_dtype in wanted}
        return [replace(self, label=label, kv_dtype=kv_dtype) for kv_dtype, label in labels.items()]


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
    """A column's result. text: None when there was none to score. answer_tokens: written by the model for the tasks.
    reference and bytes: the column's."""

    label: str
    text: TextScore | None
    tasks: tuple[TaskScore, ...]
    answer_tokens: int
    reference: str = ""
    bytes: int = 0


Report = Callable[[str, int], None]
"""Called with a column's label and how many windows and tasks were finished since the last call."""


def _ignore(label: str, count: int) -> None:
    """No report."""


async def evaluate(
    columns: Sequence[Column],
    material: Material,
    template: EngineConfig,
    *,
    folder: Path | None = None,
    lanes: int = 1,
    report: Report = _ignore,
) -> list[ColumnScore]:
    """Measures every column with an engine of its own, `lanes` engines at a time; Ray must be initialized.

    template: the engines' settings; path, name, precision and KV dtype are the columns'. folder: where references keep
    their distributions (`needed_bytes` of them); needed if a column has a reference. References begin first, and a
    window is compared as soon as it is kept, so no lane waits long. Raises what starting an engine raises,
    ScoringError, EngineUnavailable when an engine fails, and ValueError for a reference that is not among the columns.
    """
    shelves = _shelves(columns, folder) if material.documents else {}
    scores: dict[str, ColumnScore] = {}

    async def measure(column: Column) -> None:
        own = {"model_path": str(column.path), "precision": column.precision, "kv_dtype": column.kv_dtype}
        config = replace(template, name=f"eval-{column.label}", **own)
        shelf = shelves.get(column.reference)
        distributions = Distributions(shelf, column.is_reference) if shelf else None
        async with engine_session(config, column.label) as session:
            score = await measure_engine(session, column.label, material, distributions, report)
        scores[column.label] = replace(score, reference=column.reference, bytes=column.bytes)

    await work_through(sorted(columns, key=lambda column: not column.is_reference), measure, lanes)
    return [scores[column.label] for column in columns]


def windows_of(path: Path, material: Material) -> list[Window]:
    """The windows that an engine of this checkpoint scores, if its context holds them."""
    return cut_windows(Tokenizer(path), material.documents, material.window)


def _shelves(columns: Sequence[Column], folder: Path | None) -> dict[str, Shelf]:
    """A shelf for each column that is a reference, by its label."""
    references = [column.label for column in columns if column.is_reference]
    for column in columns:
        if column.reference and column.reference not in references:
            raise ValueError(f"column {column.label}: its reference {column.reference!r} is not measured")
    if references and folder is None:
        raise ValueError(f"column {references[0]}: there is no folder for its distributions")
    return {label: Shelf(folder / str(number)) for number, label in enumerate(references) if folder}


async def measure_engine(
    session: EngineSession,
    label: str,
    material: Material,
    distributions: Distributions | None = None,
    report: Report = _ignore,
) -> ColumnScore:
    """Measures one running engine. distributions: where it keeps its own, or finds those that it is compared with."""
    text = None
    if material.documents:
        length = min(material.window, session.context_length)
        windows = cut_windows(session.tokenizer, material.documents, length)
        text = await score_text(
            session.client,
            windows,
            concurrency=material.concurrency,
            distributions=distributions,
            on_window=lambda _: report(label, 1),
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
