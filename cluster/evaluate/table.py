"""An evaluation for people and for files: the quality table and its figures."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from ..figures import Figure
from .columns import SPLIT, ColumnScore
from .intervals import wilson

REFERENCE = "bf16"
Row = tuple[str, Sequence[str]]


def reference_of(scores: Sequence[ColumnScore]) -> ColumnScore | None:
    """What the others are compared with: the column "bf16", which is the native weights dequantized."""
    return next((score for score in scores if score.label == REFERENCE and score.text), None)


def quality_table(scores: Sequence[ColumnScore], extra: Sequence[Row] = ()) -> Table:
    """A column a checkpoint: rows for perplexity, its ratio to bf16 and tasks, after `extra` rows. 80 characters wide
    with six columns."""
    table = Table(title="Quality, measured through the engine", caption=_caption(scores), box=box.SIMPLE_HEAD)
    table.padding = (0, 0, 0, 1)
    table.add_column("", no_wrap=True)
    for score in scores:
        table.add_column(score.label, justify="right", no_wrap=True)
    for name, cells in extra:
        table.add_row(name, *cells, end_section=name == extra[-1][0])
    texts = [score.text for score in scores if score.text]
    if texts and len(texts) == len(scores):
        table.add_row("perplexity", *(f"{text.perplexity.value:.4f}" for text in texts))
        reference = reference_of(scores)
        if reference and reference.text:
            ratios = [text.ratio_to(reference.text) for text in texts]
            table.add_row("of bf16's", *(f"{ratio.value:.2%}" for ratio in ratios))
            table.add_row("  95 % ±", *(f"{(ratio.high - ratio.low) / 2:.2%}" for ratio in ratios))
        table.add_row("bits a byte", *(f"{text.bits_per_byte.value:.4f}" for text in texts), end_section=True)
    for row in zip(*(score.tasks for score in scores), strict=True):
        table.add_row(row[0].name.removeprefix(SPLIT), *(f"{task.right}/{task.total}" for task in row))
    for row in zip(*(score.tasks[-1:] for score in scores), strict=True):
        shares = [wilson(task.right, task.total) for task in row]
        table.add_row("all, %", *(f"{100 * share.value:.1f}" for share in shares))
        table.add_row("  95 %", *(f"{100 * share.low:.0f}–{100 * share.high:.0f}" for share in shares))
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


def _caption(scores: Sequence[ColumnScore]) -> str:
    parts = []
    if scores and (text := scores[0].text):
        documents = f"{len(text.tokens)} held-out documents"
        parts.append(f"{sum(text.tokens):,} tokens ({sum(text.sizes):,} bytes) of {documents}")
    if scores and scores[0].tasks:
        parts.append(f"{scores[0].tasks[-1].total} tasks, greedy, exact match")
    return "; ".join(parts)
