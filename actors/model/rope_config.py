"""Which rotary embedding a model uses: plain, or YaRN with DeepSeek's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .fields import ConfigError, Fields

_KNOWN = frozenset(
    {"type", "rope_type", "rope_theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    | {"original_max_position_embeddings"}
)
# Fields that other models use; here only the value that changes nothing is allowed.
_NEUTRAL = {"partial_rotary_factor": 1.0, "truncate": True, "attention_factor": None}


@dataclass(frozen=True)
class Yarn:
    """YaRN's parameters, named as in `rope_scaling`. Lengths in tokens; betas in turns over the original context."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: the ratio of the two mscales, or 0.1 ln(factor) + 1 without them."""
        if self.mscale and self.mscale_all_dim:
            return magnitude(self.factor, self.mscale) / magnitude(self.factor, self.mscale_all_dim)
        return magnitude(self.factor, 1.0)


@dataclass(frozen=True)
class RopeConfig:
    """theta: the base of the frequencies. yarn: None for plain rotary embedding."""

    theta: float
    yarn: Yarn | None


def magnitude(factor: float, mscale: float) -> float:
    """DeepSeek's `yarn_get_mscale`: 0.1 * mscale * ln(factor) + 1, and 1 for a factor up to 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_rope(fields: Fields) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (published checkpoints)."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    raw = fields.get(name)
    if raw is None:
        return RopeConfig(fields.number("rope_theta", above=1.0), None)
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{fields.name(name)}: expected an object or null, found {raw!r}")
    scaling = fields.inner(name, raw)
    _refuse_unknown(scaling, raw)
    theta = (scaling if raw.get("rope_theta") is not None else fields).number("rope_theta", above=1.0)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta, None)
    if kind != "yarn":
        raise ConfigError(f"{scaling.name('rope_type')}: {kind!r} is not supported; 'default' and 'yarn' are")
    return RopeConfig(theta, _read_yarn(scaling))


def _refuse_unknown(scaling: Fields, raw: Mapping[str, Any]) -> None:
    for key, value in raw.items():
        if key in _KNOWN:
            continue
        if key not in _NEUTRAL:
            raise ConfigError(f"{scaling.name(key)}: unknown; known are {', '.join(sorted(_KNOWN))}")
        if value != _NEUTRAL[key]:
            raise ConfigError(f"{scaling.name(key)}: {value!r} is not supported, only {_NEUTRAL[key]!r}")


def _read_yarn(scaling: Fields) -> Yarn:
    yarn = Yarn(
        factor=scaling.number("factor", above=0.0),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings", 1),
        beta_fast=scaling.number("beta_fast", above=0.0, default=32.0),
        beta_slow=scaling.number("beta_slow", above=0.0, default=1.0),
        mscale=_optional(scaling, "mscale"),
        mscale_all_dim=_optional(scaling, "mscale_all_dim"),
    )
    # DeepSeek's published code defaults a missing mscale to 1 and a missing mscale_all_dim to 0; transformers ignores
    # both unless both are there. Where that gives two models, neither reading is safe.
    published = magnitude(yarn.factor, 1.0 if yarn.mscale is None else yarn.mscale) / magnitude(
        yarn.factor, yarn.mscale_all_dim or 0.0
    )
    if not math.isclose(published, yarn.attention_factor, rel_tol=1e-9):
        raise ConfigError(
            f"{scaling.name('mscale')} {yarn.mscale} with mscale_all_dim {yarn.mscale_all_dim} is read differently by "
            "published code and by transformers; give both (non-zero) or neither"
        )
    return yarn


def _optional(scaling: Fields, key: str) -> float | None:
    return None if scaling.get(key) is None else scaling.number(key, above=-1e-30)
