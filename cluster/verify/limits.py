"""What a publisher allows a checkpoint to lose; None: the number is told and not judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..evaluate.columns import ColumnScore
from ..evaluate.intervals import Interval
from .check import Check, at_least, at_most, some
from .weights import Distance, WeightReport, relative_error


@dataclass(frozen=True)
class Limits:
    """max_kl: nats a token. min_top1: share of positions. max_perplexity_ratio: B's over A's. min_task_share: B's right
    answers over A's. max_weight_error: relative Frobenius norm of any one quantized tensor; with it, copied tensors
    must be the same to the bit. max_row_error: of any row of a quantized tensor."""

    max_kl: float | None = None
    min_top1: float | None = None
    max_perplexity_ratio: float | None = None
    min_task_share: float | None = None
    max_weight_error: float | None = None
    max_row_error: float | None = None


def weight_checks(report: WeightReport, limits: Limits) -> list[Check]:
    """The checks of two checkpoints' tensors."""
    checks = [_presence(report), _copied(report, limits)]
    for kind, distances in (("expert matrices", report.experts), ("quantized linears", report.linears)):
        if distances:
            checks += _error_checks(kind, distances, limits)
    return checks


def _presence(report: WeightReport) -> Check:
    extra = f"; only B has {some(report.extra)}" if report.extra else ""
    if report.missing:
        return Check("tensors of both", f"B lacks {some(report.missing)}{extra}", False)
    return Check("tensors of both", f"B has all that A has{extra}", True)


def _copied(report: WeightReport, limits: Limits) -> Check:
    detail = f"{len(report.identical)} are the same to the bit"
    if report.smoothed:
        detail += f", {len(report.smoothed)} are A's times powers of two (smoothing)"
    if report.differing:
        names = [f"{each.name} ({each.error:.2e})" for each in report.differing]
        detail += f", {len(names)} differ: {some(names)}"
    judged = limits.max_weight_error is not None
    if not report.differing:
        return Check("copied tensors", detail, True)
    return Check("copied tensors", detail, False if judged else None, "no difference" if judged else "")


def _error_checks(kind: str, distances: list[Distance], limits: Limits) -> list[Check]:
    worst = max(distances, key=lambda each: (_rank(each.error), each.name))
    row = max(distances, key=lambda each: (_rank(each.row_error), each.name))
    allowed = math.inf if limits.max_weight_error is None else limits.max_weight_error
    beyond = [each for each in distances if not each.error <= allowed]
    detail = f"{len(distances)} compared, error {relative_error(distances):.3%}, worst {worst.error:.3%} ({worst.name})"
    if len(beyond) > 1:
        ranked = sorted(beyond, key=lambda each: -_rank(each.error))
        detail += f", {len(beyond)} beyond the limit: {some([each.name for each in ranked], 4)}"
    where = f"{row.row_error:.3%} in row {row.worst_row} of {row.name}, which is {row.row_gain:.3f} times A's"
    return [
        at_most(f"{kind}: weight error", worst.error, limits.max_weight_error, detail),
        at_most(f"{kind}: worst row", row.row_error, limits.max_row_error, where),
    ]


def _rank(error: float) -> float:
    """NaN is worse than everything."""
    return math.inf if math.isnan(error) else error


def score_checks(a: ColumnScore, b: ColumnScore, limits: Limits) -> list[Check]:
    """The checks of what both engines answered; text and tasks as far as there were some."""
    checks: list[Check] = []
    if a.text and b.text:
        kl, top1, ratio = b.text.kl, b.text.top1, b.text.ratio_to(a.text)
        scored = f"over {sum(b.text.tokens):,} tokens of {len(b.text.tokens)} documents"
        values = f"{a.text.perplexity.value:.4f} and {b.text.perplexity.value:.4f}"
        checks += [
            at_most("KL divergence", kl.value, limits.max_kl, f"{_show(kl, '{:.6f}')} nats a token {scored}"),
            at_least("same top-1 token", top1.value, limits.min_top1, _show(top1, "{:.4%}")),
            at_most(
                "perplexity", ratio.value, limits.max_perplexity_ratio, f"{values}, ratio {_show(ratio, '{:.5f}')}"
            ),
        ]
    if a.tasks and b.tasks:
        before, after = a.tasks[-1], b.tasks[-1]
        share = after.right / before.right if before.right else math.nan
        what = f"a share of {share:.4f}" if before.right else "no share of nothing"
        detail = f"{before.right} and {after.right} of {after.total} right, {what}"
        checks.append(at_least("tasks", share, limits.min_task_share, detail))
    return checks


def _show(interval: Interval, form: str) -> str:
    return f"{form.format(interval.value)} (95 %: {form.format(interval.low)}–{form.format(interval.high)})"


def limits_need(limits: Limits) -> Sequence[str]:
    """Options of limits that only running both checkpoints can judge."""
    named = {
        "--max-kl": limits.max_kl,
        "--min-top1": limits.min_top1,
        "--max-perplexity-ratio": limits.max_perplexity_ratio,
        "--min-task-share": limits.min_task_share,
    }
    return [name for name, value in named.items() if value is not None]
