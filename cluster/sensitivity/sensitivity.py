"""The sensitivity file: what every group of experts costs when it alone is at the low format.

The base is all routed experts at `high`. Losses are differences to the base, both compared with the source as it is,
on the same text, so what the two share falls out of the intervals.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..evaluate.intervals import Interval
from ..fields import first_error
from ..figures import replace_text

Expert = tuple[int, int]
"""(layer, expert)"""
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class SensitivityError(ValueError):
    """A sensitivity file, or what was asked of one, is not what it should be; the message names file and field."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Loss(_Strict):
    """What a choice of formats loses against the base, each with its 95 % interval over documents.

    kl: KL divergence of its next-token distributions from the source's, in nats a token, less the base's.
    perplexity_ratio: its perplexity over the base's. top1: its share of tokens whose likeliest next token is the
    source's, less the base's; negative where it is lower.
    """

    kl: Interval
    perplexity_ratio: Interval
    top1: Interval

    @model_validator(mode="after")
    def _ordered(self) -> Loss:
        for name, interval in (("kl", self.kl), ("perplexity_ratio", self.perplexity_ratio), ("top1", self.top1)):
            if not interval.low <= interval.value <= interval.high:
                raise ValueError(f"{name} must lie between its low and its high")
        return self


class Unit(_Strict):
    """Experts of one layer that are chosen together. bytes: of their tensors on disk in either format."""

    layer: Count
    experts: Annotated[tuple[Count, ...], Field(min_length=1)]
    bytes_low: Positive
    bytes_high: Positive
    loss: Loss


class Check(_Strict):
    """A mixed choice that was measured as a whole, to see whether losses of units add up.

    share: of the way from all low to all high. bytes: of all routed experts. predicted: the sum of the units' losses
    in KL divergence.
    """

    share: Annotated[float, Field(ge=0, le=1)]
    bytes: Positive
    predicted: float
    loss: Loss


class Base(_Strict):
    """All routed experts at `high`, against the source as it is. kl in nats a token; perplexity_ratio over the
    source's; top1 the share of tokens with the source's likeliest next token; perplexity its own."""

    kl: Interval
    perplexity_ratio: Interval
    top1: Interval
    perplexity: Interval


class Sensitivity(_Strict):
    """One measured model. fingerprint: of the source, as calibration's. key: of all that the numbers depend on, so that
    a run goes on only with a file of the same. grouping: by number, or by use (the most used experts first)."""

    version: Literal[1] = 1
    fingerprint: str
    key: str
    low: str
    high: str
    groups: Positive
    grouping: Literal["number", "use"]
    tokens: Positive
    documents: Positive
    base: Base
    units: tuple[Unit, ...]
    checks: tuple[Check, ...] = ()
    complete: bool

    @model_validator(mode="after")
    def _disjoint(self) -> Sensitivity:
        seen: set[Expert] = set()
        for unit in self.units:
            for expert in unit.experts:
                if (unit.layer, expert) in seen:
                    raise ValueError(f"expert {expert} of layer {unit.layer} is in two units")
                seen.add((unit.layer, expert))
        return self

    @property
    def experts(self) -> frozenset[Expert]:
        """All that units hold."""
        return frozenset((unit.layer, expert) for unit in self.units for expert in unit.experts)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({unit.layer for unit in self.units}))

    def layer_units(self, layer: int) -> tuple[Unit, ...]:
        """A layer's units in the file's order."""
        return tuple(unit for unit in self.units if unit.layer == layer)

    def check(self, file: str | Path, *, low: str, high: str, experts: Collection[Expert], fingerprint: str) -> None:
        """Raises SensitivityError, naming `file`, unless it was measured to its end for this model, these formats and
        at least these experts."""
        if not self.complete:
            raise SensitivityError(
                f"{file}: complete is false: the run was stopped after {len(self.units)} units; run the same "
                "'flyray sensitivity' again, it goes on"
            )
        for name, stated, wanted in (("low", self.low, low), ("high", self.high, high)):
            if stated != wanted:
                raise SensitivityError(f"{file}: {name} is {stated}, the recipe's is {wanted}; measure with {wanted}")
        if self.fingerprint != fingerprint:
            raise SensitivityError(f"{file}: fingerprint is that of another model; measure this one")
        if missing := frozenset(experts) - self.experts:
            raise SensitivityError(f"{file}: units lack expert {min(missing)[1]} of layer {min(missing)[0]}")

    def write(self, file: Path) -> None:
        """Replaces the file in one step; a unit stands on a line of its own."""
        content = self.model_dump(mode="json")
        fields = []
        for name, value in content.items():
            if name in ("units", "checks"):
                rows = ",\n  ".join(json.dumps(row) for row in value)
                fields.append(f' "{name}": [\n  {rows}\n ]' if rows else f' "{name}": []')
            else:
                fields.append(f' "{name}": {json.dumps(value)}')
        replace_text(file, "{\n" + ",\n".join(fields) + "\n}\n")

    @classmethod
    def read(cls, file: str | Path) -> Sensitivity:
        """Raises SensitivityError naming the file and the field."""
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise SensitivityError(f"{file} cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise SensitivityError(f"{file} is not a sensitivity file: it is not text") from None
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise SensitivityError(f"{file} is not a sensitivity file: {first_error(error, cls)[1]}") from None
