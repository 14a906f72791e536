"""Weight formats of the routed experts: packing, unpacking, and folding group scales into integer multipliers.

A matrix has N output rows and K input columns. Bits and names follow the published checkpoints:

- native (`w4a16`; compressed-tensors `pack-quantized`): INT4 in groups of 32 along K, eight values an int32, least
  significant nibble first, offset binary (value + 8); one bfloat16 scale a group.
- `w4a8`: the native nibbles untouched, each group's scale written as an integer multiplier times one scale a row.
- `w4a8-channel` (AMD Quark `int4_fp8`): INT4 per output row, AWQ nibble order, two's complement, two scales.
- `w8a8`: INT8 per output row. `w8a8-fp8` (AMD Quark `ptpc_fp8`): float8_e4m3fn per output row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .folding import MAX_MULTIPLIER, fold_rows

FORMATS = ("bf16", "w4a16", "w8a8", "w4a8", "w8a8-fp8", "w4a8-channel")
GROUP_SIZE = 32
PACK = 8
"""INT4 values an int32."""

# Column of nibble i (least significant first) within its eight: AutoAWQ's order, which Quark calls "reorder".
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

_GROUPS_A_CHUNK = 1 << 16  # about 1 MB of temporaries: stays in cache, and bounds memory


@dataclass(frozen=True)
class FoldedScales:
    """Group scales as integers: weight = value * multiplier * scale. multipliers [N, K/32] uint8 in 1..15, scale [N]
    float32 (0 for a row of zeros)."""

    multipliers: Tensor
    scale: Tensor


def unpack_native(packed: Tensor) -> Tensor:
    """packed [N, K/8] int32 -> values [N, K] int8 in -8..7."""
    _expect("packed", packed, torch.int32, 2)
    return _nibbles(_bytes(packed)).sub_(8)


def pack_native(values: Tensor) -> Tensor:
    """values [N, K] int8 in -8..7 -> [N, K/8] int32; K must be a multiple of 8."""
    _expect_int4(values, PACK)
    nibbles = (values + 8).view(torch.uint8)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def unpack_awq(packed: Tensor) -> Tensor:
    """packed [N, K/8] int32 in AWQ order -> values [N, K] int8 in -8..7."""
    _expect("packed", packed, torch.int32, 2)
    nibbles = _nibbles(_bytes(packed)).unflatten(1, (-1, PACK))
    inverse = torch.tensor(AWQ_ORDER, device=packed.device).argsort()
    return (nibbles[..., inverse].flatten(1) ^ 8).sub_(8)


def pack_awq(values: Tensor) -> Tensor:
    """values [N, K] int8 in -8..7 -> [N, K/8] int32 in AWQ order; K must be a multiple of 8."""
    _expect_int4(values, PACK)
    order = torch.tensor(AWQ_ORDER, device=values.device)
    nibbles = (values & 15).view(torch.uint8).unflatten(1, (-1, PACK))[..., order].flatten(1)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous().view(torch.int32)


def dequantize_native(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """packed [N, K/8] int32, scale [N, K/32] -> weights [N, K]. The product is exact in float32 and rounded once to
    `dtype`; bfloat16 is what compressed-tensors itself decompresses to."""
    return dequantize_groups(unpack_native(packed), scale).to(dtype)


def dequantize_groups(values: Tensor, scale: Tensor) -> Tensor:
    """values [N, K] int8, scale [N, K/32] -> [N, K] float32."""
    _expect_groups("scale", scale, values)
    return (values.unflatten(1, (-1, GROUP_SIZE)).float() * scale.float().unsqueeze(-1)).flatten(1)


def dequantize_folded(values: Tensor, folded: FoldedScales) -> Tensor:
    """values [N, K] int8 with folded scales -> [N, K] float32."""
    return dequantize_rows(multiply_out(values, folded.multipliers), folded.scale)


def dequantize_rows(values: Tensor, scale: Tensor) -> Tensor:
    """values [N, K] int8 or float8_e4m3fn, scale [N] -> [N, K] float32."""
    if scale.shape != values.shape[:1]:
        raise ValueError(f"scale has shape {list(scale.shape)}, expected one a row: [{values.shape[0]}]")
    return values.float() * scale.float().unsqueeze(-1)


def multiply_out(values: Tensor, multipliers: Tensor) -> Tensor:
    """values [N, K] int8 in -8..7, multipliers [N, K/32] uint8 in 1..15 -> the products [N, K] int8, exact."""
    _expect_groups("multipliers", multipliers, values)
    if multipliers.numel() and (int(multipliers.min()) < 1 or int(multipliers.max()) > MAX_MULTIPLIER):
        raise ValueError(f"multipliers must lie in 1..{MAX_MULTIPLIER}")
    grouped = values.unflatten(1, (-1, GROUP_SIZE))
    return (grouped * multipliers.view(torch.int8).unsqueeze(-1)).flatten(1)


def fold_scales(values: Tensor, group_scale: Tensor) -> FoldedScales:
    """Writes every group's scale as an integer multiplier times one scale a row, with the least weight error found.

    values [N, K] int8 in -8..7, group_scale [N, K/32] float (bfloat16 in the native format). The search is that of
    `folding`; a `WeightQuantizer` does the same, fast, from packed nibbles.

    A group of zeros may have any finite scale and gets multiplier 1. Refused with ValueError, naming row and group:
    a group scale that is not finite, or is zero or negative while the group has values: no positive multiplier can
    express it without changing the nibbles.
    """
    _expect_int4(values, GROUP_SIZE)
    _expect_groups("group_scale", group_scale, values)
    if not group_scale.is_floating_point():
        raise ValueError(f"group_scale must be floating point, is {group_scale.dtype}")
    rows = max(1, _GROUPS_A_CHUNK // max(1, group_scale.shape[1]))
    multipliers = torch.empty(group_scale.shape, dtype=torch.uint8, device=values.device)
    scale = torch.empty(values.shape[0], dtype=torch.float32, device=values.device)
    for first in range(0, values.shape[0], rows):
        chunk = slice(first, first + rows)
        energy = values[chunk].unflatten(1, (-1, GROUP_SIZE)).float().square().sum(-1)
        multipliers[chunk], scale[chunk] = fold_rows(energy, group_scale[chunk].float(), first)
    return FoldedScales(multipliers, scale)


def split_nibbles(values: Tensor) -> Tensor:
    """values [N, K] int8 in -8..7 -> [N, K/2] uint8, the layout of `protocol.Int4Matrix`: byte j of a group's 16 holds
    column j in its low nibble and column j + 16 in its high one, offset binary. K must be a multiple of 32."""
    _expect_int4(values, GROUP_SIZE)
    halves = (values + 8).view(torch.uint8).unflatten(1, (-1, 2, GROUP_SIZE // 2))
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def join_nibbles(nibbles: Tensor) -> Tensor:
    """[N, K/2] uint8 of `split_nibbles` -> values [N, K] int8."""
    _expect("nibbles", nibbles, torch.uint8, 2)
    _expect_multiple("nibbles", nibbles.shape[1], GROUP_SIZE // 2)
    grouped = nibbles.unflatten(1, (-1, 1, GROUP_SIZE // 2))
    return torch.cat((grouped & 15, grouped >> 4), dim=2).flatten(1).view(torch.int8).sub_(8)


def pack_multipliers(multipliers: Tensor) -> Tensor:
    """multipliers [N, G] uint8 in 1..15 -> [N, G/2] uint8 on disk, the even group in the low nibble; G even."""
    _expect("multipliers", multipliers, torch.uint8, 2)
    _expect_multiple("multipliers", multipliers.shape[1], 2)
    if multipliers.numel() and (int(multipliers.min()) < 1 or int(multipliers.max()) > MAX_MULTIPLIER):
        raise ValueError(f"multipliers must lie in 1..{MAX_MULTIPLIER}")
    return multipliers[:, 0::2] | (multipliers[:, 1::2] << 4)


def unpack_multipliers(packed: Tensor) -> Tensor:
    """packed [N, G/2] uint8 -> multipliers [N, G] uint8; a zero multiplier is refused."""
    _expect("packed multipliers", packed, torch.uint8, 2)
    multipliers = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    if multipliers.numel() and int(multipliers.min()) < 1:
        raise ValueError(f"packed multipliers hold a 0; every multiplier lies in 1..{MAX_MULTIPLIER}")
    return multipliers


def quantize_int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] float -> (values int8 [N, K] in -127..127, scale float32 [N]): scale = absmax / 127, half to even;
    a row of zeros has scale 0."""
    _expect_finite_matrix(weight)
    weight = weight.float()
    largest = weight.abs().amax(1)
    scale = largest / torch.full_like(largest, 127)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = (weight / divisor.unsqueeze(-1)).round_().clamp_(-127, 127).to(torch.int8)
    return values, scale


def quantize_native(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] float -> (values int8 [N, K], scale bfloat16 [N, K/32]) in the native format's groups.

    scale = absmax / 7 rounded to bfloat16, values half to even: the native model's own rounding, so weights that came
    out of such a checkpoint are found again. Quark's amax / 7.5 would lose 6.7 % on them."""
    _expect_finite_matrix(weight)
    _expect_multiple("weight", weight.shape[1], GROUP_SIZE)
    groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
    scale = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    values = (groups / divisor.unsqueeze(-1)).round_().clamp_(-8, 7).to(torch.int8).flatten(1)
    return values, scale


def _bytes(packed: Tensor) -> Tensor:
    # A view in memory order: int32 is little-endian on every machine that torch runs these kernels on.
    return packed.contiguous().view(torch.uint8)


def _nibbles(data: Tensor) -> Tensor:
    """data [N, B] uint8 -> nibbles [N, 2 * B] int8 in 0..15, low first."""
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(1).view(torch.int8)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, dims: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != dims:
        raise ValueError(f"{name} must be {dtype} with {dims} dimensions, is {tensor.dtype} {list(tensor.shape)}")


def _expect_multiple(name: str, size: int, multiple: int) -> None:
    if size % multiple:
        raise ValueError(f"{name}: {size} columns are not a multiple of {multiple}")


def _expect_int4(values: Tensor, multiple: int) -> None:
    _expect("values", values, torch.int8, 2)
    _expect_multiple("values", values.shape[1], multiple)
    if values.numel() and (int(values.min()) < -8 or int(values.max()) > 7):
        raise ValueError(f"values must lie in -8..7, are in {int(values.min())}..{int(values.max())}")


def _expect_groups(name: str, scale: Tensor, values: Tensor) -> None:
    if values.dim() != 2 or values.shape[1] % GROUP_SIZE:
        raise ValueError(f"values must be [N, K] with K a multiple of {GROUP_SIZE}, are {list(values.shape)}")
    expected = [values.shape[0], values.shape[1] // GROUP_SIZE]
    if list(scale.shape) != expected:
        raise ValueError(f"{name} has shape {list(scale.shape)}, expected one a group of {GROUP_SIZE}: {expected}")


def _expect_finite_matrix(weight: Tensor) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating-point matrix, is {weight.dtype} {list(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds values that are not finite")
