"""An evaluation for people and for files: the quality table and its figures."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .evaluate import ColumnScore, TaskScore
from .figures import Figure
from .intervals import wilson

REFERENCE = "bf16"


def reference_of(scores: Sequence[ColumnScore]) -> ColumnScore | None:
    """What the others are compared with: the column "bf16", which is the native weights dequantized."""
    return next((score for score in scores if score.label == REFERENCE and score.text), None)


def quality_table(scores: Sequence[ColumnScore]) -> Table:
    """A column each, rows for perplexity, its ratio to bf16, bits a byte and the tasks; intervals are 95 %."""
    table = Table(title="Quality through the engine", caption=_caption(scores), caption_justify="left")
    table.add_column("")
    for score in scores:
        table.add_column(score.label, justify="right", no_wrap=True)
    reference = reference_of(scores)
    if any(score.text for score in scores):
        table.add_row("perplexity", *(f"{score.text.perplexity.value:.4f}" if score.text else "" for score in scores))
        if reference:
            table.add_row("… of bf16's", *(_ratio(score, reference) for score in scores))
            table.add_row("… ±", *(_ratio_half(score, reference) for score in scores))
        bits = [f"{score.text.bits_per_byte.value:.4f}" if score.text else "" for score in scores]
        table.add_row("bits a byte", *bits, end_section=True)
    for row in zip(*(score.tasks for score in scores), strict=True):
        table.add_row(row[0].name, *(f"{task.right}/{task.total}" for task in row))
    for row in zip(*(score.tasks[-1:] for score in scores), strict=True):
        table.add_row("… of all, %", *(_share(task) for task in row))
    return table


def figures(scores: Sequence[ColumnScore]) -> list[Figure]:
    """perplexity.FORMAT, perplexity_ratio.FORMAT, bits_per_byte.FORMAT (all with .low and .high),
    task_score.TASK.FORMAT, and what was measured: eval.tokens, eval.bytes, eval.documents, eval.tasks."""
    found: list[Figure] = []
    reference = reference_of(scores)
    for score in scores:
        if score.text:
            named = {"perplexity": score.text.perplexity, "bits_per_byte": score.text.bits_per_byte}
            if reference and reference.text:
                named["perplexity_ratio"] = score.text.ratio_to(reference.text)
            for name, interval in named.items():
                unit = "bits/byte" if name == "bits_per_byte" else "1"
                found.append(Figure(f"{name}.{score.label}", interval.value, unit))
                found.append(Figure(f"{name}.{score.label}.low", interval.low, unit))
                found.append(Figure(f"{name}.{score.label}.high", interval.high, unit))
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


def _ratio(score: ColumnScore, reference: ColumnScore) -> str:
    if not score.text or not reference.text:
        return ""
    return f"{score.text.ratio_to(reference.text).value:.3%}"


def _ratio_half(score: ColumnScore, reference: ColumnScore) -> str:
    if not score.text or not reference.text or score is reference:
        return ""
    interval = score.text.ratio_to(reference.text)
    return f"{(interval.high - interval.low) / 2:.3%}"


def _share(task: TaskScore) -> str:
    interval = wilson(task.right, task.total)
    return f"{interval.value:.0%} ({100 * interval.low:.0f}–{100 * interval.high:.0f})"


def _caption(scores: Sequence[ColumnScore]) -> str:
    parts = []
    if scores and (text := scores[0].text):
        documents = f"{len(text.tokens)} held-out documents"
        parts.append(f"{sum(text.tokens):,} tokens ({sum(text.sizes):,} bytes) of {documents}")
    if scores and scores[0].tasks:
        parts.append(f"{scores[0].tasks[-1].total} tasks, greedy, exact match")
    return "; ".join(parts) + "; 95 % intervals"
