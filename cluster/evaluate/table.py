"""An evaluation for people and for files: the quality tables and their figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table

from ..figures import Figure
from .columns import SPLIT, ColumnScore
from .intervals import Interval, wilson
from .perplexity import TextScore

COLUMNS = 6
"""Columns of a table that is 80 characters wide."""
_HEADING = 12
Row = tuple[str, Sequence[str]]


def reference_of(score: ColumnScore, scores: Iterable[ColumnScore]) -> TextScore | None:
    """The text of what a column is compared with."""
    return next((other.text for other in scores if score.reference and other.label == score.reference), None)


def quality_tables(scores: Sequence[ColumnScore], weight_errors: dict[str, float] | None = None) -> list[Table]:
    """A column a checkpoint: rows for size, perplexity, its ratio to the reference's, KL divergence from the reference
    and agreement with it, and tasks. `COLUMNS` columns a table, so that each fits 80 characters.

    weight_errors: relative error of the weights by label, as quantizing found it.
    """
    parts = [scores[begin : begin + COLUMNS] for begin in range(0, len(scores), COLUMNS)]
    tables = [_table(part, scores, weight_errors or {}) for part in parts]
    tables[0].title = "Quality, measured through the engine"
    tables[-1].caption = _caption(scores)
    return tables


def _table(part: Sequence[ColumnScore], scores: Sequence[ColumnScore], weight_errors: dict[str, float]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.padding = (0, 0, 0, 1)
    table.add_column("", no_wrap=True)
    for score in part:
        table.add_column(heading(score.label), justify="right", no_wrap=True)
    for rows in (_size_rows(part, weight_errors), _text_rows(part, scores), _task_rows(part)):
        for name, cells in rows:
            table.add_row(name, *cells, end_section=name == rows[-1][0])
    return table


def heading(label: str) -> str:
    """A label in lines of about `_HEADING` characters, broken after a "-" or ":"."""
    lines = [""]
    for piece in label.replace(":", ":\0").replace("-", "-\0").split("\0"):
        if lines[-1] and len(lines[-1] + piece) > _HEADING:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _size_rows(part: Sequence[ColumnScore], weight_errors: dict[str, float]) -> list[Row]:
    rows: list[Row] = []
    if any(score.bytes for score in part):
        rows.append(("MB on disk", [f"{score.bytes / 1e6:,.1f}" if score.bytes else "" for score in part]))
    if any(score.label in weight_errors for score in part):
        errors = [weight_errors.get(score.label) for score in part]
        rows.append(("weight error", ["" if error is None else f"{error:.2%}" for error in errors]))
    return rows


def _text_rows(part: Sequence[ColumnScore], scores: Sequence[ColumnScore]) -> list[Row]:
    texts = [score.text for score in part if score.text]
    if len(texts) < len(part):
        return []
    rows: list[Row] = [("perplexity", [f"{text.perplexity.value:.4f}" for text in texts])]
    pairs = [(text, reference_of(score, scores)) for text, score in zip(texts, part, strict=True)]
    if any(reference for _, reference in pairs):
        ratios = [text.ratio_to(reference) if reference else None for text, reference in pairs]
        rows += _with_interval("of reference's", ratios, "{:.2%}")
    divergences = [text.kl if text.divergences else None for text in texts]
    if any(divergences):
        rows += _with_interval("KL, nats", divergences, "{:.5f}")
        agreements = [text.top1 if text.agreements else None for text in texts]
        rows += _with_interval("same top-1", agreements, "{:.2%}")
    return [*rows, ("bits a byte", [f"{text.bits_per_byte.value:.4f}" for text in texts])]


def _with_interval(name: str, intervals: Sequence[Interval | None], form: str) -> list[Row]:
    """The values, and half the width of their intervals."""
    values = ["" if each is None else form.format(each.value) for each in intervals]
    halves = ["" if each is None else form.format((each.high - each.low) / 2) for each in intervals]
    return [(name, values), ("  95 % ±", halves)]


def _task_rows(part: Sequence[ColumnScore]) -> list[Row]:
    rows: list[Row] = []
    for row in zip(*(score.tasks for score in part), strict=True):
        rows.append((row[0].name.removeprefix(SPLIT), [f"{task.right}/{task.total}" for task in row]))
    for row in zip(*(score.tasks[-1:] for score in part), strict=True):
        shares = [wilson(task.right, task.total) for task in row]
        rows.append(("all, %", [f"{100 * share.value:.1f}" for share in shares]))
        rows.append(("  95 %", [f"{100 * share.low:.0f}–{100 * share.high:.0f}" for share in shares]))
    return rows


def figures(scores: Sequence[ColumnScore]) -> list[Figure]:
    """perplexity.LABEL, bits_per_byte.LABEL, and where there is a reference perplexity_ratio.LABEL, kl.LABEL (nats a
    token) and top1.LABEL, all with .low and .high; bytes.LABEL, task_score.TASK.LABEL, and what was measured:
    eval.tokens, eval.bytes, eval.documents, eval.tasks. The reference's own ratio, kl and top1 are 1, 0 and 1."""
    found: list[Figure] = []
    for score in scores:
        if score.text:
            for name, (interval, unit) in _text_intervals(score.text, reference_of(score, scores)).items():
                found.append(Figure(f"{name}.{score.label}", interval.value, unit))
                found.append(Figure(f"{name}.{score.label}.low", interval.low, unit))
                found.append(Figure(f"{name}.{score.label}.high", interval.high, unit))
        if score.bytes:
            found.append(Figure(f"bytes.{score.label}", score.bytes, "bytes"))
        for task in score.tasks:
            found.append(Figure(f"task_score.{task.name}.{score.label}", task.right / task.total, "1"))
    for score in scores[:1]:
        if score.text:
            found.append(Figure("eval.tokens", sum(score.text.tokens), "tokens"))
            found.append(Figure("eval.bytes", sum(score.text.sizes), "bytes"))
            found.append(Figure("eval.documents", len(score.text.tokens), "documents"))
        if score.tasks:
            found.append(Figure("eval.tasks", score.tasks[-1].total, "tasks"))
    return found


def _text_intervals(text: TextScore, reference: TextScore | None) -> dict[str, tuple[Interval, str]]:
    found = {"perplexity": (text.perplexity, "1"), "bits_per_byte": (text.bits_per_byte, "bits/byte")}
    if reference is None:
        return found
    compared = bool(text.divergences)  # all but the reference itself
    found["perplexity_ratio"] = (text.ratio_to(reference), "1")
    found["kl"] = (text.kl if compared else Interval(0.0, 0.0, 0.0), "nats/token")
    found["top1"] = (text.top1 if compared else Interval(1.0, 1.0, 1.0), "1")
    return found


def _caption(scores: Sequence[ColumnScore]) -> str:
    parts = []
    if scores and (text := scores[0].text):
        documents = f"{len(text.tokens)} held-out documents"
        parts.append(f"{sum(text.tokens):,} tokens ({sum(text.sizes):,} bytes) of {documents}")
    references = list(dict.fromkeys(score.reference for score in scores if score.reference))
    if references and scores[0].text:
        parts.append(f"reference: {', '.join(references)}")
    if scores and scores[0].tasks:
        parts.append(f"{scores[0].tasks[-1].total} tasks, greedy, exact match")
    return "; ".join(parts)
