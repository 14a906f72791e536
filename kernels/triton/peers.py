"""Writing into the memory of other GPUs of the same node: rows to the experts' GPUs, and their outputs back.

The places of every GPU's buffers are addresses, as this process sees them. Each GPU writes what the others will read
and then meets them; nothing else is exchanged, so no transfer is larger than what is needed.
"""

# Triton's language is typed for its compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..protocol import Activations

_BLOCK = 2048


@triton.jit
def push_row(
    values, scale, ids, table, counts, value_places, scale_places, expert_places, first_slot, held, shard, tokens,
    words, slots, columns,
    SCALED: tl.constexpr, WORDS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One token's row to one GPU; program (token, GPU). There it is row shard * tokens + token.

    values: rows of `words` int32 words. ids [tokens, slots] are counted, once, and become numbers of that GPU's own
    slots, -1 for others', by the table [experts, columns], whose column is that of the row.
    """
    token, peer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = shard * tokens + token
    word = tl.arange(0, WORDS)
    place = tl.load(value_places + peer).to(tl.pointer_type(tl.int32))
    part = tl.load(values + token * words + word, mask=word < words, other=0)
    tl.store(place + row * words + word, part, mask=word < words)
    if SCALED:
        tl.store(tl.load(scale_places + peer).to(tl.pointer_type(tl.float32)) + row, tl.load(scale + token))
    slot = tl.arange(0, SLOTS)
    chosen = tl.load(ids + token * slots + slot, mask=slot < slots, other=0)
    if peer == 0:
        tl.atomic_add(counts + chosen, 1, mask=slot < slots, sem="relaxed")
    number = tl.load(table + chosen * columns + token % columns, mask=slot < slots, other=0)
    local = number - tl.load(first_slot + peer)
    local = tl.where((local >= 0) & (local < tl.load(held + peer)), local, -1)
    place = tl.load(expert_places + peer).to(tl.pointer_type(tl.int32))
    tl.store(place + row * slots + slot, local, mask=slot < slots)


@triton.jit
def push_output(outputs, pair_expert, places, pairs, size, BLOCK: tl.constexpr):
    """A pair's output [size] float32 to the GPU it came from, `pairs` of each; program (pair, columns). Pairs of no
    expert here are left out."""
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(pair_expert + pair) < 0:
        return
    place = tl.load(places + pair // pairs).to(tl.pointer_type(tl.float32)) + (pair % pairs) * size
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(outputs + pair * size + column, mask=column < size, other=0.0)
    tl.store(place + column, part, mask=column < size)


@triton.jit
def meet_peers(flag_places, flags, turn, shard, SHARDS: tl.constexpr):
    """Waits until all GPUs are here, with all that they wrote before. flags: [SHARDS] int32, how often each was here;
    turn: [1] int32, how often this one was. Both may overflow."""
    number = tl.load(turn) + 1
    tl.store(turn, number)
    for peer in tl.static_range(SHARDS):
        place = tl.load(flag_places + peer).to(tl.pointer_type(tl.int32)) + shard
        tl.atomic_xchg(place, number, sem="release", scope="sys")
    for peer in tl.static_range(SHARDS):
        while number - tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys") > 0:
            pass


def push_rows(
    x: Activations,
    ids: Tensor,
    routes: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    shard: int,
) -> None:
    """Rows [T, D] and their experts' slots to all GPUs. ids: [T, K] int32, the experts. routes: a table [E, W] int32 of
    slots, of which row r reads column r % W, and counts [E] int32, to which the ids are added. places: [shards] int64
    addresses of every GPU's values [shards * T, D], scales [shards * T] float32 and slots [shards * T, K] int32. held:
    [shards] int32, the first slot of each GPU and how many it has."""
    values = x.values.view(torch.int32)
    (tokens, words), slots, shards = values.shape, ids.shape[1], len(held[0])
    push_row[(tokens, shards)](
        values, values if x.scale is None else x.scale, ids, *routes, *places, *held, shard, tokens, words, slots,
        routes[0].shape[1], x.scale is not None, triton.next_power_of_2(words), triton.next_power_of_2(slots),
        num_warps=4,
    )  # fmt: skip


def push_outputs(outputs: Tensor, pair_expert: Tensor, places: Tensor) -> None:
    """Outputs [shards * P, D] float32 of P pairs of each GPU to their GPUs, places: [shards] int64 addresses of every
    GPU's slots [P, D] float32."""
    pairs, size = outputs.shape
    grid = pairs, triton.cdiv(size, _BLOCK)
    push_output[grid](outputs, pair_expert, places, pairs // len(places), size, _BLOCK, num_warps=4)


def meet(flag_places: Tensor, flags: Tensor, turn: Tensor, shard: int) -> None:
    """`meet_peers`, flag_places: [shards] int64 addresses of every GPU's flags."""
    meet_peers[(1,)](flag_places, flags, turn, shard, len(flags), num_warps=1)


__all__ = ["meet", "push_outputs", "push_rows"]
