"""What stands in the KV pages for a token: its latent [L] and its rotated key [R].

In pages of float32 or bfloat16 an entry is L + R words, which the backend lays out. In pages of int8 or float8_e4m3fn
it is the same bytes in every backend: the latent as `Kernels.quantize` rounds it, in 8 bits with one scale, and the
rotated key in bfloat16, for that one is not normed and loses most in 8 bits (docs/performance.md).

    codes [L], up to a multiple of 16 | key [R] bfloat16, up to one of 4 | scale float32, up to a multiple of 16

Padding is zeros. 512 + 64 values take 656 bytes; 1152 in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .protocol import ActivationFormat, Activations

ROUNDED: dict[torch.dtype, ActivationFormat] = {
    torch.int8: ActivationFormat.INT8,
    torch.float8_e4m3fn: ActivationFormat.FP8,
}
"""Pages in 8 bits, and how their latents are quantized."""


@dataclass(frozen=True)
class EntryLayout:
    """Of an entry in 8 bits, in bytes: where its rotated key and its scale begin, and its size."""

    key: int
    scale: int
    size: int

    @staticmethod
    def of(rank: int, rope: int) -> EntryLayout:
        key = _up(rank, 16)
        scale = _up(key + 2 * rope, 4)
        return EntryLayout(key, scale, _up(scale + 4, 16))


def entry_width(kv_dtype: torch.dtype, rank: int, rope: int) -> int:
    """Words of `kv_dtype` that an entry takes in pages."""
    return EntryLayout.of(rank, rope).size if kv_dtype in ROUNDED else rank + rope


def pack_entries(latent: Activations, key: Tensor) -> Tensor:
    """latent [T, L] in 8 bits, key [T, R] float32 -> entries [T, bytes] uint8."""
    assert latent.scale is not None
    layout = EntryLayout.of(latent.values.shape[1], key.shape[1])
    codes, scale = latent.values.view(torch.uint8), latent.scale[:, None].view(torch.uint8)
    turned = key.to(torch.bfloat16).contiguous().view(torch.uint8)
    parts = ((codes, layout.key), (turned, layout.scale - layout.key), (scale, layout.size - layout.scale))
    return torch.cat([pad(part, (0, size - part.shape[1])) for part, size in parts], dim=1)


def unpack_entries(entries: Tensor, rank: int, rope: int) -> tuple[Tensor, Tensor]:
    """entries [C, bytes] of int8 or float8_e4m3fn -> codes and key [C, L + R] float32, and scale [C] float32."""
    layout, stored = EntryLayout.of(rank, rope), entries.view(torch.uint8)
    key = stored[:, layout.key : layout.key + 2 * rope].contiguous().view(torch.bfloat16)
    scale = stored[:, layout.scale : layout.scale + 4].contiguous().view(torch.float32)
    return torch.cat([entries[:, :rank].to(torch.float32), key.to(torch.float32)], dim=1), scale[:, 0]


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


__all__ = ["ROUNDED", "EntryLayout", "entry_width", "pack_entries", "unpack_entries"]
