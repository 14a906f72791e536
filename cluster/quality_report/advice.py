"""What to do, in plain words: sentences that follow from the numbers, each with the numbers in it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ..evaluate.intervals import Interval
from ..quantize.manifest import MatrixError
from ..quantize.mixed import choose, expert_sizes, unit_loss
from ..sensitivity.sensitivity import Sensitivity, Unit
from .inputs import EvalColumn, Evaluation, Inputs, Quantized

OUTLIER = 1.5
"""A matrix stands out if its error is so many times the median of its kind and format in its checkpoint."""
_NAMED = 6
_SHARE = 0.5


@dataclass(frozen=True)
class Advice:
    """What is found or to do, and why."""

    what: str
    why: str


def advice(inputs: Inputs) -> list[Advice]:
    """All that follows from what is there, the most important first."""
    found: list[Advice] = []
    if inputs.evaluation is not None:
        found += _of_formats(inputs.evaluation)
        found += _of_tasks(inputs.evaluation)
    if inputs.sensitivity is not None:
        found += _of_layers(inputs.sensitivity)
        found += _of_checks(inputs.sensitivity)
    for each in inputs.quantized:
        found += _of_matrices(each)
    return found


def _of_formats(evaluation: Evaluation) -> Iterator[Advice]:
    # The reference itself, whose divergence is 0 without an interval, is no choice between formats.
    measured = [column for column in evaluation.columns if column.kl and column.kl.high > 0 and column.bytes]
    worse_than: dict[str, list[EvalColumn]] = defaultdict(list)
    by_label = {column.label: column for column in measured}
    for worse in measured:
        better = [column for column in measured if _dominates(column, worse)]
        if better:
            worse_than[min(better, key=lambda column: _value(column.kl)).label].append(worse)
    for label, columns in worse_than.items():
        best = by_label[label]
        losses = "; ".join(f"{worse.label} {_size(worse)}, {_kl(worse.kl)}" for worse in columns)
        yield Advice(
            f"Prefer {label} to {_listed(worse.label for worse in columns)}.",
            f"It is no larger and surely loses less. KL divergence in millinats a token: {label} {_size(best)}, "
            f"{_kl(best.kl)}; {losses}.",
        )
    for lower, upper in _unseparated(measured):
        yield Advice(
            f"Do not choose between {lower.label} and {upper.label} by their loss.",
            f"KL divergences of {_kl(lower.kl)} and {_kl(upper.kl)} millinats a token have intervals that overlap; "
            "measure more text, or choose by size and speed.",
        )
    ratios = [(column.label, column.perplexity_ratio) for column in evaluation.columns if column.perplexity_ratio]
    same = [label for label, ratio in ratios if ratio.low <= 1 <= ratio.high and ratio.low < ratio.high]
    sized = [column for column in evaluation.columns if column.label in same and column.bytes]
    smallest = min(sized, key=lambda column: column.bytes or 0, default=None)
    higher = [(label, ratio) for label, ratio in ratios if ratio.low > 1]
    if higher:
        listed = ", ".join(f"{label} {_percent(ratio)}" for label, ratio in higher)
        yield Advice(
            "Expect a measurable loss in perplexity from some formats.", f"Above the reference, with 95 %: {listed}."
        )
    if same:
        yield Advice(
            f"On this text the perplexity of {_listed(same)} cannot be told from the reference's.",
            f"The intervals of the ratio hold 1 ({evaluation.tokens:,} tokens of {evaluation.documents} documents)."
            + (f" The smallest of them is {smallest.label}, {_size(smallest)}." if smallest and len(same) > 1 else ""),
        )


def _of_tasks(evaluation: Evaluation) -> Iterator[Advice]:
    shares = [(column.label, share) for column in evaluation.columns if (share := evaluation.task_share(column))]
    if len(shares) < 2:
        return
    best, worst = max(shares, key=lambda each: each[1].low), min(shares, key=lambda each: each[1].high)
    numbers = f"{evaluation.tasks} tasks: {_share(best)}, {_share(worst)}"
    if best[1].low > worst[1].high:
        yield Advice(f"{worst[0]} does tasks measurably worse than {best[0]}.", f"{numbers}.")
    else:
        yield Advice(
            "Do not rank the formats by these task scores.",
            f"{numbers}; the intervals of all overlap. KL divergence is the finer measure.",
        )


def _of_layers(found: Sensitivity) -> Iterator[Advice]:
    ranked = sorted(found.units, key=lambda unit: -unit_loss(unit))
    total = math.fsum(map(unit_loss, ranked))
    if total == 0:
        yield Advice(f"Put all experts at {found.low}.", "No unit loses anything that was measured.")
        return
    heavy: list[Unit] = []
    while math.fsum(map(unit_loss, heavy)) < _SHARE * total:
        heavy.append(ranked[len(heavy)])
    share = sum(len(unit.experts) for unit in heavy) / len(found.experts)
    yield Advice(
        f"Keep {_units(found, heavy)} at {found.high} first.",
        f"They hold {math.fsum(map(unit_loss, heavy)) / total:.0%} of the summed loss in {share:.0%} of the experts.",
    )
    if spread := _spread(found):
        yield spread
    silent = [unit for unit in found.units if unit.loss.kl.low <= 0]
    if silent:
        yield Advice(
            f"{len(silent)} of {len(found.units)} units can go to {found.low} without a loss that this text shows.",
            "Their intervals reach down to 0: what order they have among themselves is noise.",
        )
    choices = [(percent, choose(found, f"{percent}%", *expert_sizes(found))) for percent in (25, 50, 75)]
    listed = ", ".join(f"{percent}% saves {1 - choice.predicted / total:.0%}" for percent, choice in choices)
    yield Advice(
        "Choose the budget by what it saves.",
        f"Of the loss from all {found.high} to all {found.low}, a budget of {listed}; experts chosen at random would "
        "save as much as the budget's share.",
    )


def _spread(found: Sensitivity) -> Advice | None:
    sums = {layer: math.fsum(map(unit_loss, found.layer_units(layer))) for layer in found.layers}
    middle = median(sums.values())
    high = sorted((layer for layer in sums if sums[layer] > 2 * middle), key=lambda layer: -sums[layer])
    if not high or middle == 0:
        return None
    listed = ", ".join(f"{layer} ({sums[layer] / middle:.1f} times)" for layer in high[:_NAMED])
    return Advice(
        f"Mind layer {_listed(map(str, sorted(high[:_NAMED])))}: more than twice the median layer's loss.",
        f"Against the median: {listed}. A recipe without a sensitivity file can give them a rule of their own.",
    )


def _of_checks(found: Sensitivity) -> Iterator[Advice]:
    off = [check for check in found.checks if not check.loss.kl.low <= check.predicted <= check.loss.kl.high]
    if found.checks and not off:
        yield Advice(
            "Trust the predicted losses.",
            f"All {len(found.checks)} mixed choices that were measured as a whole lose what the sum of their units "
            "predicts, within their intervals.",
        )
    for word, part in (
        ("less", [check for check in off if check.predicted > check.loss.kl.high]),
        ("more", [check for check in off if check.predicted < check.loss.kl.low]),
    ):
        if part:
            measured = (f"{check.share:.0%}: {_kl(check.loss.kl)} for {1000 * check.predicted:.3f}" for check in part)
            shares = _listed(f"{check.share:.0%}" for check in part)
            yield Advice(
                f"Losses do not quite add up: {shares} of the way, choices lose {word} than predicted.",
                f"Measured for predicted millinats a token: {'; '.join(measured)}. Measure a finished mixed checkpoint "
                "before you state its loss.",
            )


def _of_matrices(each: Quantized) -> Iterator[Advice]:
    kinds: dict[tuple[str, str], list[MatrixError]] = defaultdict(list)
    for matrix in each.matrices:
        kinds[matrix.format, matrix.kind].append(matrix)
    medians = {key: median(matrix.relative for matrix in matrices) for key, matrices in kinds.items()}
    times = {m.name: m.relative / middle for m in each.matrices if (middle := medians[m.format, m.kind]) > 0}
    outliers = sorted((name for name in times if times[name] > OUTLIER), key=lambda name: (-times[name], name))
    if outliers:
        more = len(outliers) - _NAMED // 2
        listed = [f"{name} ({times[name]:.1f} times)" for name in outliers[: _NAMED // 2]]
        listed += [f"{more} more"] if more > 0 else []
        yield Advice(
            f"{each.label}: clip {len(outliers)} of {len(each.matrices):,} matrices (clip: mse) or give them 8 bits.",
            f"They have heavy tails. Errors against the median of their kind and format: {_listed(listed)}.",
        )
    if each.uncalibrated:
        yield Advice(
            f"{each.label}: calibrate with more, or more varied, text.",
            f"{len(each.uncalibrated)} matrices belong to experts that calibration never reached; they were rounded "
            "without it and are named below.",
        )


def _dominates(one: EvalColumn, other: EvalColumn) -> bool:
    """Whether it is no larger and surely loses less."""
    if one.kl is None or other.kl is None or one.bytes is None or other.bytes is None:
        return False
    return one.bytes <= other.bytes and one.kl.high < other.kl.low


def _unseparated(measured: list[EvalColumn]) -> Iterator[tuple[EvalColumn, EvalColumn]]:
    """Neighbours in the order of loss whose intervals overlap."""
    ranked = sorted(measured, key=lambda column: _value(column.kl))
    for lower, upper in pairwise(ranked):
        if lower.kl and upper.kl and lower.kl.high >= upper.kl.low:
            yield lower, upper


def _units(found: Sensitivity, heavy: list[Unit]) -> str:
    """Layers with the number of their groups among the heavy ones."""
    layers: dict[int, int] = defaultdict(int)
    for unit in heavy:
        layers[unit.layer] += 1
    shown = sorted(layers)[:_NAMED]
    parts = [
        f"layer {layer}"
        + ("" if layers[layer] == len(found.layer_units(layer)) else f" ({layers[layer]} of its groups)")
        for layer in shown
    ]
    more = len(layers) - len(shown)
    return _listed(parts) + (f" and parts of {more} more layers" if more else "")


def _listed(parts: Iterable[str]) -> str:
    words = list(parts)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _value(interval: Interval | None) -> float:
    return math.inf if interval is None else interval.value


def _kl(interval: Interval | None) -> str:
    if interval is None:
        return "unknown"
    return f"{1000 * interval.value:.3f} ({1000 * interval.low:.3f} to {1000 * interval.high:.3f})"


def _percent(ratio: Interval) -> str:
    return f"{ratio.value - 1:+.2%} ({ratio.low - 1:+.2%} to {ratio.high - 1:+.2%})"


def _share(each: tuple[str, Interval]) -> str:
    label, share = each
    return f"{label} {share.value:.1%} ({share.low:.1%} to {share.high:.1%})"


def _size(column: EvalColumn) -> str:
    size = column.bytes or 0
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
