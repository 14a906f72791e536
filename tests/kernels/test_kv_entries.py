"""Entries of KV pages in 8 bits against NumPy's reading of their bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import normal

from flyray.kernels.kv_entries import ROUNDED, entry_width, pack_entries, unpack_entries
from flyray.kernels.reference import ReferenceKernels


def test_widths() -> None:
    assert entry_width(torch.float32, 512, 64) == entry_width(torch.bfloat16, 512, 64) == 576
    assert entry_width(torch.int8, 512, 64) == entry_width(torch.float8_e4m3fn, 512, 64) == 656
    assert entry_width(torch.int8, 128, 32) == 208


@pytest.mark.parametrize("kv_dtype", ROUNDED)
@given(st.integers(0, 5), st.integers(1, 70), st.integers(1, 40), st.integers(0, 99))
def test_round_trip(kv_dtype: torch.dtype, tokens: int, rank: int, rope: int, seed: int) -> None:
    latent, key = normal(seed, tokens, rank) * 10.0 ** (seed % 7 - 3), normal(seed + 1, tokens, rope)
    rows = ReferenceKernels().quantize(latent, ROUNDED[kv_dtype])
    assert rows.scale is not None
    entries = pack_entries(rows, key)
    assert entries.shape == (tokens, entry_width(kv_dtype, rank, rope))
    assert entries.shape[1] % 16 == 0
    stored = entries.numpy()
    begin = -(-rank // 16) * 16
    scale_at = -(-(begin + 2 * rope) // 4) * 4
    assert np.array_equal(stored[:, :rank], rows.values.view(torch.uint8).numpy())
    high = np.ascontiguousarray(stored[:, begin : begin + 2 * rope]).view(np.uint16).astype(np.uint32) << 16
    assert np.array_equal(high.view(np.float32), key.bfloat16().float().numpy())
    scale = np.ascontiguousarray(stored[:, scale_at : scale_at + 4]).view(np.float32)
    assert np.array_equal(scale[:, 0], rows.scale.numpy())
    for padding in (stored[:, rank:begin], stored[:, begin + 2 * rope : scale_at], stored[:, scale_at + 4 :]):
        assert not padding.any()
    values, sizes = unpack_entries(entries.view(kv_dtype), rank, rope)
    assert torch.equal(values, torch.cat([rows.values.float(), key.bfloat16().float()], dim=1))
    assert torch.equal(sizes, rows.scale)
