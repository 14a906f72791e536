from __future__ import annotations

import pytest
import torch

from flyray.kernels.aiter.fnuz import fnuz_scale, fnuz_values


@pytest.mark.parametrize("factor", [1.0, 0.0123, 2.0**-120])
def test_every_code_keeps_its_product(factor: float) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor(factor)
    values, doubled = fnuz_values(codes), fnuz_scale(scale)
    assert values.dtype == torch.float8_e4m3fnuz
    before, after = codes.float() * scale, values.float() * doubled
    assert torch.equal(before.isnan(), after.isnan())
    assert before.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    finite = ~before.isnan()
    assert torch.equal(before[finite], after[finite])
    assert values.view(torch.uint8)[0x80] == 0
    assert (values.view(torch.uint8) == codes.view(torch.uint8)).sum() == 256 - 3  # -0 and the two NaN


def test_untranslated_bits_are_half_the_value() -> None:
    codes = torch.arange(1, 0x7F, dtype=torch.uint8)
    assert torch.equal(codes.view(torch.float8_e4m3fnuz).float() * 2, codes.view(torch.float8_e4m3fn).float())


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float8_e5m2, expected torch\.float8_e4m3fn"):
        fnuz_values(torch.zeros(2).to(torch.float8_e5m2))
