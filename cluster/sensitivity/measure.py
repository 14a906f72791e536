"""Measures units one after the other through one engine: all experts at the high format, the unit's at the low one."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ...actors.engine_config import EngineConfig
from ...actors.quantization_config import format_experts
from ..engine_session import EngineSession, engine_session
from ..evaluate.distributions import Distributions, Shelf
from ..evaluate.intervals import ratio_of_sums
from ..evaluate.perplexity import TextScore, Window, score_text
from ..quantize.mixed import choose, expert_sizes
from .sensitivity import Base, Check, Expert, Loss, Sensitivity, Unit
from .units import PlannedUnit


@dataclass(frozen=True)
class Measuring:
    """One measuring run. engine: settings of the engines but for their checkpoint. source is compared with, as it is;
    low and high: the two checkpoints. shares: of the way from all low to all high, measured as whole choices."""

    engine: EngineConfig
    source: Path
    low: Path
    high: Path
    windows: Sequence[Window]
    units: Sequence[PlannedUnit]
    shares: Sequence[float]
    concurrency: int

    @property
    def runs(self) -> int:
        """How often the text is scored when nothing is kept: the source, the base, every unit, every share."""
        return 2 + len(self.units) + len(self.shares)


class Progress:
    """Told how a run goes; this one ignores it."""

    def scoring(self, what: str) -> None:
        """What is scored from now on."""

    def window(self) -> None:
        """One window was scored."""


async def measure(
    run: Measuring,
    folder: Path,
    blank: Callable[[Base, TextScore], Sensitivity],
    kept: Sensitivity | None,
    save: Callable[[Sensitivity], None],
    progress: Progress,
) -> Sensitivity:
    """Measures what `kept` lacks, and calls `save` after every unit and choice. Ray must be initialized.

    folder: takes the source's distributions. blank: the file without units, from the base's scores. Raises what
    starting an engine raises, ScoringError, and EngineError when an override fails.
    """
    shelf = Shelf(folder / "source")
    native = await _score_source(run, shelf, progress)
    async with engine_session(replace(run.engine, model_path=str(run.high), name="sensitivity"), "high") as session:
        scorer = _Scorer(run, session, shelf, progress)
        base = await scorer.score("all high")
        found = blank(_base(base, native), base)
        if kept is not None:
            found = found.model_copy(update={"units": kept.units, "checks": kept.checks})
        units = {(unit.layer, unit.experts) for unit in found.units}
        for planned in run.units:
            if (planned.layer, planned.experts) not in units:
                low = [(planned.layer, expert) for expert in planned.experts]
                score = await scorer.score_with(
                    low, f"layer {planned.layer}, experts {format_experts(planned.experts)}"
                )
                found = _with_unit(found, planned, loss_against(score, base))
                save(found)
        for share in run.shares[len(found.checks) :]:
            found = await _check(found, share, scorer, base)
            save(found)
    return found.model_copy(update={"complete": True})


async def _score_source(run: Measuring, shelf: Shelf, progress: Progress) -> TextScore:
    progress.scoring("the source")
    async with engine_session(replace(run.engine, model_path=str(run.source), name="source"), "source") as session:
        return await score_text(
            session.client,
            run.windows,
            concurrency=run.concurrency,
            distributions=Distributions(shelf, fills=True),
            on_window=lambda _: progress.window(),
        )


class _Scorer:
    """Scores the text with some experts at the low format, against the source's distributions."""

    def __init__(self, run: Measuring, session: EngineSession, shelf: Shelf, progress: Progress) -> None:
        self._run, self._session, self._progress = run, session, progress
        self._distributions = Distributions(shelf, fills=False)

    async def score(self, what: str) -> TextScore:
        self._progress.scoring(what)
        return await score_text(
            self._session.client,
            self._run.windows,
            concurrency=self._run.concurrency,
            distributions=self._distributions,
            on_window=lambda _: self._progress.window(),
        )

    async def score_with(self, low: Sequence[Expert], what: str) -> TextScore:
        async with self._overridden(low):
            return await self.score(what)

    @asynccontextmanager
    async def _overridden(self, low: Sequence[Expert]) -> AsyncIterator[None]:
        layers: dict[int, list[int]] = defaultdict(list)
        for layer, expert in sorted(low):
            layers[layer].append(expert)
        engine = self._session.engine
        for layer, experts in layers.items():
            await asyncio.to_thread(engine.override_experts, layer, experts, str(self._run.low))
        yield
        await asyncio.to_thread(engine.clear_overrides)


async def _check(found: Sensitivity, share: float, scorer: _Scorer, base: TextScore) -> Sensitivity:
    """Adds a measured choice to the file."""
    choice = choose(found, f"{100 * share:g}%", *expert_sizes(found))
    score = await scorer.score_with(sorted(found.experts - choice.high), f"mixed at {share:.0%}")
    check = Check(share=share, bytes=choice.bytes, predicted=choice.predicted, loss=loss_against(score, base))
    return found.model_copy(update={"checks": (*found.checks, check)})


def loss_against(score: TextScore, base: TextScore) -> Loss:
    """Differences to the base, document by document."""
    divergences = [a - b for a, b in zip(score.divergences, base.divergences, strict=True)]
    agreements = [a - b for a, b in zip(score.agreements, base.agreements, strict=True)]
    return Loss(
        kl=ratio_of_sums(divergences, score.tokens),
        perplexity_ratio=score.ratio_to(base),
        top1=ratio_of_sums(agreements, score.tokens),
    )


def _base(base: TextScore, native: TextScore) -> Base:
    return Base(kl=base.kl, perplexity_ratio=base.ratio_to(native), top1=base.top1, perplexity=base.perplexity)


def _with_unit(found: Sensitivity, planned: PlannedUnit, loss: Loss) -> Sensitivity:
    unit = Unit(
        layer=planned.layer,
        experts=planned.experts,
        bytes_low=planned.bytes_low,
        bytes_high=planned.bytes_high,
        loss=loss,
    )
    return found.model_copy(update={"units": (*found.units, unit)})
