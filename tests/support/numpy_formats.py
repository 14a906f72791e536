"""The formats on disk, defined once more in NumPy: tensors of a matrix -> its weights. Independent of flyray's code."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of the nibbles from the least significant


def weights_of(format: str, parts: Mapping[str, torch.Tensor]) -> NDArray[np.float64]:
    """[N, K] float64."""
    match format:
        case "w4a16":
            values = offset_binary(parts["weight_packed"])
            return values * np.repeat(parts["weight_scale"].double().numpy(), 32, axis=1)
        case "w4a8":
            values = offset_binary(parts["weight_packed"])
            packed = parts["weight_multiplier"].numpy()
            multipliers = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)
            scale = parts["weight_scale"].double().numpy()[:, None]
            return values * np.repeat(multipliers.astype(np.float64), 32, axis=1) * scale
        case "w4a8-channel":
            nibbles = words_to_nibbles(parts["weight"])
            values = np.empty_like(nibbles)
            values[..., list(AWQ_COLUMNS)] = nibbles
            signed = np.where(values > 7, values - 16, values).reshape(len(values), -1)
            scale = parts["weight_scale"].double().numpy() * parts["weight_scale_2"].double().numpy()
            return signed * scale[:, None]
        case "w8a8":
            return parts["weight"].double().numpy() * parts["weight_scale"].double().numpy()[:, None]
        case "w8a8-fp8":
            return e4m3(parts["weight"]) * parts["weight_scale"].double().numpy()[:, None]
    return parts["weight"].double().numpy()


def words_to_nibbles(words: torch.Tensor) -> NDArray[np.float64]:
    """[N, K / 8] int32 -> [N, K / 8, 8], the least significant first."""
    unsigned = words.numpy().view(np.uint32)
    return np.stack([(unsigned >> np.uint32(4 * index)) & np.uint32(15) for index in range(8)], axis=2).astype(float)


def offset_binary(words: torch.Tensor) -> NDArray[np.float64]:
    nibbles = words_to_nibbles(words)
    return nibbles.reshape(len(nibbles), -1) - 8


def e4m3(weight: torch.Tensor) -> NDArray[np.float64]:
    """OCP FP8 e4m3fn, from its bits."""
    bits = weight.view(torch.uint8).numpy().astype(int)
    sign, exponent, fraction = bits >> 7, (bits >> 3) & 15, bits & 7
    magnitude = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    return np.where(sign == 1, -magnitude, magnitude)
