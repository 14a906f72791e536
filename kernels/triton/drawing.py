"""Tokens of rows of logits, as `kernels/sampling.py` defines them to the bit, drawn without waiting for the device.

Four launches. In the first three the parts of a row are run by programs of their own:

1. `find_largest`: each part's largest logit.
2. `weigh`: each part's sum of weights at temperature 1 and at the row's; and, where top-k or top-p cuts the row, how
   many of its logits lie in each of `_BINS` bins by their distance from the largest.
3. `narrow`: the counts alone bound the weight of each bin, so they say in which few bins the last kept logit lies. What
   is in the bins before is kept, its weights are summed part by part; what is in these bins is listed, in any order.
4. `choose_token`: a program a row finds the last kept of the list, then the part that the random number falls into, and
   in this the token. A greedy row's token is the first largest of the first part that has it.

Sums are integers, so no order of adding matters, and the bins, whose bounds are generous, decide nothing but where to
look. A list that is too long, as of very many nearly equal logits, is not read; the row itself is, which takes longer.
"""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocol import Drawn
from .arithmetic import ordered_exp
from .logits import (
    HIGHEST,
    LOWEST,
    POWER,
    ROW_WORDS,
    bin_edge,
    ids_of,
    logit_bins,
    logit_weights,
    needed_weight,
    order_numbers,
    read_logits,
    row_facts,
)

_PART = 2048
"""Logits of one program of the first three launches."""
_LISTED, _CHUNK = 8192, 2048
"""Most logits in a row's list, and how many a program looks at together; it keeps the first so many in registers."""
_BINS = 256
_COUNTS = _BINS + 4
"""Behind the counts of a row's bins: the length of its list, its first and its last bin, and k where top-k cuts."""


@triton.jit
def find_largest(logits, largest, counts, size, PART: tl.constexpr, BINS: tl.constexpr, COUNTS: tl.constexpr):
    """logits [S, size] -> largest [S, parts]. Clears counts [S, COUNTS]."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = part * PART + tl.arange(0, PART)
    value = tl.load(logits + row * size + column, mask=column < size, other=float("-inf"))
    broken = tl.max((value != value).to(tl.int32), 0) > 0
    tl.store(largest + row * tl.num_programs(0) + part, tl.where(broken, float("nan"), tl.max(value, 0)))
    if part == 0:
        tl.store(counts + row * COUNTS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
        tl.store(counts + row * COUNTS + BINS, 0)


@triton.jit
def weigh(
    logits, words, largest, sums, counts, size,
    PART: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """words [S, WORDS] float64 -> of sums [S, 3, parts] int64 the first two; counts by bin."""
    part, row, parts = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    top, draws, divisor, limit = row_facts(words, largest, row, parts, PARTS)
    column = part * PART + tl.arange(0, PART)
    inside = column < size
    value = tl.load(logits + row * size + column, mask=inside, other=float("-inf"))
    apart = value - top
    weight = tl.where(inside, logit_weights(apart), 0)
    place = sums + row * 3 * parts + part
    tl.store(place, tl.sum(weight, 0))
    if draws:
        if divisor != 1.0:
            apart = tl.div_rn(apart, divisor + tl.zeros_like(apart))
            weight = logit_weights(apart)
        left = inside & (value.to(tl.float64) >= limit)
        tl.store(place + parts, tl.sum(tl.where(left, weight, 0), 0))
        if (tl.load(words + row * ROW_WORDS + 1) < 1.0) | (tl.load(words + row * ROW_WORDS + 4) > 0.0):
            count = tl.histogram(tl.where(left, logit_bins(apart, BINS), BINS - 1), BINS)
            bin = tl.arange(0, BINS)
            tl.atomic_add(counts + row * COUNTS + bin, count, mask=(count > 0) & (bin < BINS - 1), sem="relaxed")


@triton.jit
def _bracket(counts, total, top_p, top_k, BINS: tl.constexpr):
    """The first and the last bin in which the last kept logit may be, and k where top-k cuts; last is -1 where nothing
    does."""
    bin = BINS - 1 - tl.arange(0, BINS)
    count = tl.load(counts + bin)
    from_here = tl.cumsum(count, 0)
    everything = tl.sum(count, 0)
    k = tl.where((top_k > 0) & (top_k < everything), top_k, 0)
    first, last = 0, -1
    if k > 0:
        last = tl.sum((everything - from_here + count < k).to(tl.int32), 0)
    elif top_p < 1.0:
        spare = (total - needed_weight(total, top_p)).to(tl.float64)
        # Of one logit in the bin, in weights.
        most = ordered_exp(-bin_edge(bin.to(tl.float32))).to(tl.float64) * POWER * 1.0001 + 1.0
        least = tl.maximum(ordered_exp(-bin_edge(bin.to(tl.float32) + 1.0)).to(tl.float64) * POWER * 0.9999 - 1.0, 0.0)
        last = tl.sum(((tl.cumsum(count * most, 0) > spare) & (bin > 0)).to(tl.int32), 0)
        first = tl.sum(((tl.cumsum(count * least, 0) > spare) & (bin > 0)).to(tl.int32), 0)
    return first, last, k


@triton.jit
def narrow(
    logits, words, largest, sums, counts, listed, size,
    PART: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, COUNTS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """-> the third of sums; listed [S, 2, LISTED] int64, `order_numbers` and weights; what stands behind the counts."""
    part, row, parts = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    top, draws, divisor, limit = row_facts(words, largest, row, parts, PARTS)
    top_p = tl.load(words + row * ROW_WORDS + 1)
    top_k = tl.load(words + row * ROW_WORDS + 4).to(tl.int32)
    counts += row * COUNTS
    sums += row * 3 * parts
    first, last, k = 0, -1, 0
    if draws & ((top_p < 1.0) | (top_k > 0)):
        every = tl.arange(0, PARTS)
        total = tl.sum(tl.load(sums + parts + every, mask=every < parts, other=0), 0)
        first, last, k = _bracket(counts, total, top_p, top_k, BINS)
    if part == 0:
        tl.store(counts + BINS + 1, first)
        tl.store(counts + BINS + 2, last)
        tl.store(counts + BINS + 3, k)
    if last >= 0:
        kept = tl.zeros((), tl.int64)
        # The bin of the part's largest: most parts of most rows have nothing that is kept.
        if logit_bins(tl.div_rn(tl.load(largest + row * parts + part) - top, divisor), BINS) <= last:
            column = part * PART + tl.arange(0, PART)
            value, apart, bin = read_logits(logits + row * size, column, size, top, divisor, limit, BINS)
            weight = logit_weights(apart)
            kept = tl.sum(tl.where(bin < first, weight, 0), 0)
            here = ((bin >= first) & (bin <= last)).to(tl.int32)
            place = tl.atomic_add(counts + BINS, tl.sum(here, 0), sem="relaxed") + tl.cumsum(here, 0) - 1
            fits = (here > 0) & (place < LISTED)
            listed += row * 2 * LISTED
            tl.store(listed + place, order_numbers(value, column), mask=fits)
            tl.store(listed + LISTED + place, weight, mask=fits)
        tl.store(sums + 2 * parts + part, kept)


@triton.jit
def _entries(begin, row, LISTED: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr):
    """Numbers and weights of `CHUNK` entries of a row's list, or, where it does not fit, of so many columns of the row;
    `LOWEST` and 0 where there is none. row: as `choose_token` describes it."""
    logits, listed, fits, end, top, divisor, limit, first, last = row
    entry = begin + tl.arange(0, CHUNK)
    if fits:
        number = tl.load(listed + entry, mask=entry < end, other=LOWEST)
        weight = tl.load(listed + LISTED + entry, mask=entry < end, other=0)
    else:
        value, apart, bin = read_logits(logits, entry, end, top, divisor, limit, BINS)
        here = (bin >= first) & (bin <= last)
        number = tl.where(here, order_numbers(value, entry), LOWEST)
        weight = tl.where(here, logit_weights(apart), 0)
    return number, weight


@triton.jit
def _tally(number, weight, middle):
    """How many entries there are from `middle` on, what they weigh, the least of them, and the largest before."""
    above = number >= middle
    count = tl.sum(above.to(tl.int32), 0)
    sum = tl.sum(tl.where(above, weight, 0), 0)
    return count, sum, tl.min(tl.where(above, number, HIGHEST), 0), tl.max(tl.where(above, LOWEST, number), 0)


@triton.jit
def _last_kept(
    number, weight, low, kept, counting, wanted, row, end, LISTED: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    """The largest entry from `low` on such that it and all larger are, or weigh, at least `wanted`; and what these
    weigh. number, weight: the first entries. kept: what is given where `low` is none."""
    high = tl.full((), HIGHEST, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count, sum, above, below = _tally(number, weight, middle)
        for begin in range(CHUNK, end, CHUNK):
            other, more = _entries(begin, row, LISTED, CHUNK, BINS)
            other_count, other_sum, other_above, other_below = _tally(other, more, middle)
            count += other_count
            sum += other_sum
            above = tl.minimum(above, other_above)
            below = tl.maximum(below, other_below)
        reached = tl.where(counting, count.to(tl.int64), sum) >= wanted
        kept = tl.where(reached, sum, kept)
        high = tl.where(reached, high, tl.maximum(below, low))
        low = tl.where(reached, above, low)
    return low, kept


@triton.jit
def _weight_before(
    number, weight, least, bound, row, end, LISTED: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr
):
    """The weight of all entries from `least` on with ids below `bound`."""
    sum = tl.sum(tl.where((number >= least) & (ids_of(number) < bound), weight, 0), 0)
    for begin in range(CHUNK, end, CHUNK):
        other, more = _entries(begin, row, LISTED, CHUNK, BINS)
        sum += tl.sum(tl.where((other >= least) & (ids_of(other) < bound), more, 0), 0)
    return sum


@triton.jit
def choose_token(
    logits, words, largest, sums, counts, listed, tokens, logprobs, tops, size, parts,
    PART: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, COUNTS: tl.constexpr,
    LISTED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """-> tokens [S] int64, logprobs [S] float32, tops [S] float32: the largest logits."""
    number = tl.program_id(0).to(tl.int64)
    top, draws, divisor, limit = row_facts(words, largest, number, parts, PARTS)
    logits += number * size
    sums += number * 3 * parts
    every = tl.arange(0, PARTS)
    real = every < parts
    column = tl.arange(0, PART)
    if draws:
        words += number * ROW_WORDS
        counts += number * COUNTS + BINS
        listed += number * 2 * LISTED
        top_p, end, first = tl.load(words + 1), tl.load(counts), tl.load(counts + 1)
        last, k = tl.load(counts + 2), tl.load(counts + 3)
        fits = end <= LISTED
        end = tl.where(fits, end, size)
        row = (logits, listed, fits, end, top, divisor, limit, first, last)
        entry, weight = _entries(0, row, LISTED, CHUNK, BINS)
        # By part, of what is kept whatever the list has; and of all that top-p has to do with.
        sure = tl.load(sums + tl.where(last >= 0, 2, 1) * parts + every, mask=real, other=0)
        whole = tl.sum(tl.load(sums + parts + every, mask=real, other=0), 0)
        total, kept = tl.sum(sure, 0), tl.zeros((), tl.int64)
        least = tl.full((), LOWEST, tl.int64)
        for turn in range(2):  # top-k, then top-p of what it left
            wanted = tl.where(turn == 0, k.to(tl.int64), needed_weight(whole, top_p) - total)
            if tl.where(turn == 0, k > 0, (last >= 0) & (top_p < 1.0)):
                least, kept = _last_kept(entry, weight, least, kept, turn == 0, wanted, row, end, LISTED, CHUNK, BINS)
                whole = kept
        total += kept
        target = tl.minimum((total.to(tl.float64) * tl.load(words + 3)).to(tl.int64), total - 1)
        part, high, passed = 0, parts - 1, tl.zeros((), tl.int64)
        while part < high:
            middle = (part + high + 1) >> 1
            before = tl.sum(tl.where(every < middle, sure, 0), 0)
            before += _weight_before(entry, weight, least, middle * PART, row, end, LISTED, CHUNK, BINS)
            here = before <= target
            passed = tl.where(here, before, passed)
            part = tl.where(here, middle, part)
            high = tl.where(here, high, middle - 1)
        column += part * PART
        value, apart, bin = read_logits(logits, column, size, top, divisor, limit, BINS)
        inside = (bin < BINS - 1) & (order_numbers(value, column) >= least)
        found = tl.cumsum(tl.where(inside, logit_weights(apart), 0), 0) > target - passed
    else:
        each = tl.load(largest + number * parts + every, mask=real, other=float("nan"))
        column += tl.min(tl.where(each == top, every, parts - 1), 0) * PART
        found = tl.load(logits + column, mask=column < size, other=float("nan")) == top
    token = tl.min(tl.where(found, column, size - 1), 0)
    given = tl.load(logits + token)
    log_sum = tl.log(tl.sum(tl.load(sums + every, mask=real, other=0), 0).to(tl.float64) * (1.0 / POWER))
    tl.store(tokens + number, token.to(tl.int64))
    tl.store(tops + number, top)
    tl.store(logprobs + number, (given.to(tl.float64) - top.to(tl.float64) - log_sum).to(tl.float32))


def draw(logits: Tensor, words: Tensor) -> Drawn:
    """`AheadKernels.draw`."""
    logits = logits.to(torch.float32).contiguous()
    (rows, size), device = logits.shape, logits.device
    parts = triton.cdiv(size, _PART)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    logprobs, tops = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    largest = torch.empty((rows, parts), dtype=torch.float32, device=device)
    sums = torch.empty((rows, 3, parts), dtype=torch.int64, device=device)
    counts = torch.empty((rows, _COUNTS), dtype=torch.int32, device=device)
    listed = torch.empty((rows, 2, _LISTED), dtype=torch.int64, device=device)
    sizes = {"PART": _PART, "PARTS": triton.next_power_of_2(parts), "BINS": _BINS, "COUNTS": _COUNTS}
    grid, kept = (parts, rows), (logits, words, largest, sums, counts)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    find_largest[grid](logits, largest, counts, size, _PART, _BINS, _COUNTS, **options)
    weigh[grid](*kept, size, **sizes, **options)
    narrow[grid](*kept, listed, size, **sizes, LISTED=_LISTED, **options)
    options["num_warps"] = 8
    choose_token[rows,](
        *kept, listed, tokens, logprobs, tops, size, parts, **sizes, LISTED=_LISTED, CHUNK=_CHUNK, **options
    )
    return Drawn(tokens, logprobs, tops)


__all__ = ["draw"]
