"""Rotary position embedding: the tables of cos and sin, and the softmax scale that YaRN changes with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig
from .rope_config import Yarn, magnitude


def rope_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0..length, each [length, R/2] float32, YaRN's attention factor multiplied in."""
    frequencies = _frequencies(config)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    factor = 1.0 if config.rope.yarn is None else config.rope.yarn.attention_factor
    return angles.cos() * factor, angles.sin() * factor


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(head size), times YaRN's magnitude for mscale_all_dim squared (DeepSeek's `softmax_scale`)."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope.yarn
    if yarn is None or not yarn.mscale_all_dim:
        return scale
    return scale * magnitude(yarn.factor, yarn.mscale_all_dim) ** 2


def _frequencies(config: ModelConfig) -> Tensor:
    """Radians a position of every pair of dimensions, [R/2] float32."""
    size, theta, yarn = config.qk_rope_head_dim, config.rope.theta, config.rope.yarn
    periods = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    plain = 1.0 / periods
    if yarn is None:
        return plain
    stretched = 1.0 / (yarn.factor * periods)
    keep = 1.0 - _ramp(*_correction_range(yarn, size, theta), size // 2)
    return stretched * (1.0 - keep) + plain * keep


def _correction_range(yarn: Yarn, size: int, theta: float) -> tuple[float, float]:
    """The dimensions between which YaRN blends: those that turn beta_fast and beta_slow times in the old context."""

    def dimension(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return size * math.log(turns) / (2 * math.log(theta))

    low, high = math.floor(dimension(yarn.beta_fast)), math.ceil(dimension(yarn.beta_slow))
    return max(low, 0), min(high, size - 1)


def _ramp(low: float, high: float, size: int) -> Tensor:
    """0 up to dimension `low`, 1 from `high` on, linear between."""
    if low == high:
        high += 0.001  # as published, against a division by zero
    return ((torch.arange(size, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
