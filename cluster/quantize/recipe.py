"""Recipes: which modules get which format, and how; small YAML files, of which some are shipped.

    version: 1
    about: INT8 experts with clipping
    rules:                                          # the first rule that matches a module decides
      - modules: ["model.layers.*.mlp.experts.*"]   # globs, or regular expressions after "re:"
        format: w8a8
        clip: mse
    exclude: ["*.self_attn.kv_b_proj"]              # wins over rules; what no rule matches stays as it is

Module names are those of the published checkpoints without the prefix "language_model." and without ".weight".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..fields import first_error
from ..yaml_file import YamlError, read_yaml
from .matrix import QuantizeError

FOLDER = Path(__file__).parent / "recipes"

EXPERTS = "model.layers.*.mlp.experts.*"
"""The pattern of all routed experts."""

Format = Literal["w4a8", "w8a8", "w8a8-fp8", "w4a8-channel"]
Clip = Literal["none", "mse", "energy"]
# Not strict in that a YAML list becomes a tuple.
Patterns = Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Scheme(_Strict):
    """How one matrix is quantized."""

    format: Format
    by: Literal["flyray", "quark"] = "flyray"
    """Who rounds. Quark makes w8a8, w8a8-fp8 and w4a8-channel, each without clip and error feedback."""
    clip: Clip = "none"
    """The scales: from the largest value; with the least squared error; or that weighted by calibrated energy."""
    error_feedback: bool = False
    """GPTQ: a column's rounding error is made up for in the columns after it; needs calibrated second moments."""

    @model_validator(mode="after")
    def _possible(self) -> Scheme:
        if self.by == "quark" and (self.clip != "none" or self.error_feedback):
            raise ValueError("by: quark has neither clip nor error_feedback; by: flyray has")
        if self.by == "quark" and self.format == "w4a8":
            raise ValueError("by: quark cannot make w4a8; by: flyray can")
        if self.by == "flyray" and self.format == "w8a8-fp8":
            raise ValueError("by: flyray cannot make w8a8-fp8; by: quark can")
        return self

    @property
    def needs_calibration(self) -> bool:
        return self.clip == "energy" or self.error_feedback


class Mixed(_Strict):
    """Two schemes for routed experts; a sensitivity file and the budget decide, expert group by expert group."""

    low: Scheme
    high: Scheme
    budget: str = "50%"
    """Bytes of all routed experts that the rule decides over, as "400 GB"; or a share of the way from all of them low
    (0%) to all high (100%)."""


class Rule(_Strict):
    """modules: patterns. Then either a scheme's keys, or `mixed`."""

    modules: Patterns
    scheme: Scheme | None = None
    mixed: Mixed | None = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, data: object) -> object:
        """The scheme's keys stand beside `modules` in the file."""
        if not isinstance(data, dict) or "mixed" in data or "scheme" in data:
            return data
        own = {key: data[key] for key in data if key == "modules"}
        return own | {"scheme": {key: data[key] for key in data if key != "modules"}}

    @field_validator("modules")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _readable(patterns)

    @model_validator(mode="after")
    def _one(self) -> Rule:
        if (self.scheme is None) == (self.mixed is None):
            raise ValueError("has either a format or mixed")
        return self


class Recipe(_Strict):
    """name: of the file, without its ending."""

    name: str
    version: Literal[1]
    about: str = ""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, strict=False)]
    exclude: Annotated[tuple[str, ...], Field(strict=False)] = ()
    smoothing: Annotated[float, Field(ge=0, le=1)] | None = None
    """SmoothQuant's exponent for the routed experts' inputs; needs calibration. None: no smoothing."""

    @field_validator("exclude")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _readable(patterns)

    @model_validator(mode="after")
    def _one_mixed(self) -> Recipe:
        if sum(rule.mixed is not None for rule in self.rules) > 1:
            raise ValueError("only one rule can be mixed, for one budget; give it all the patterns")
        return self

    def rule_for(self, module: str) -> Rule | None:
        """The rule for a module ("model.layers.3.mlp.experts.5.up_proj"), None if it stays as it is."""
        if any(matches(pattern, module) for pattern in self.exclude):
            return None
        return next((rule for rule in self.rules if any(matches(pattern, module) for pattern in rule.modules)), None)

    @property
    def mixed(self) -> Mixed | None:
        return next((rule.mixed for rule in self.rules if rule.mixed), None)

    def schemes(self) -> Iterator[Scheme]:
        """Every scheme that a matrix may get."""
        for rule in self.rules:
            if rule.scheme:
                yield rule.scheme
            if rule.mixed:
                yield rule.mixed.low
                yield rule.mixed.high

    @property
    def needs_calibration(self) -> bool:
        return self.smoothing is not None or any(scheme.needs_calibration for scheme in self.schemes())


def _readable(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Raises ValueError naming a pattern that is no regular expression."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return patterns


def matches(pattern: str, module: str) -> bool:
    """A glob, where * also crosses dots, or after "re:" a regular expression for the whole name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], module) is not None
    return fnmatchcase(module, pattern)


def shipped() -> tuple[str, ...]:
    """Names of the recipes that come with flyray."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def load_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by name, or a file's. Raises QuantizeError naming the file and the key."""
    file = Path(name)
    if str(name) in shipped():
        file = FOLDER / f"{name}.yaml"
    elif file.suffix not in (".yaml", ".yml"):
        raise QuantizeError(f"unknown recipe {str(name)!r}; shipped are {', '.join(shipped())}, or name a .yaml file")
    try:
        data = read_yaml(file, "recipe", "'version:' and 'rules:'")
    except YamlError as error:
        raise QuantizeError(str(error)) from error
    if "name" in data:
        raise QuantizeError(f"{file}: unknown key 'name'; a recipe is called like its file")
    try:
        return Recipe.model_validate(data | {"name": file.stem})
    except ValidationError as error:
        # In the file a scheme's keys stand beside `modules`.
        found = first_error(error, Recipe, "key")[1].replace(".scheme.", ".")
        raise QuantizeError(f"{file}: {found}") from error
