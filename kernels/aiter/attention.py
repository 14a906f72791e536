"""MLA attention over latent pages by AITER's decode kernel, prompts too.

Every query is a sequence of its own, in one call with a number of splits that is always the same: what a query's bits
depend on is then its own entries alone, however a prompt was cut, and a token computed again in a prompt gets the bits
of its decoding. AITER's prefill kernel sums in another order, and its own choice of splits depends on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..protocol import PagedBatch
from .package import Aiter

LATENT, ROPE = 512, 64
"""The only sizes of an entry that the assembly has."""
GROUP = 16
"""Heads a call sees: every release has a kernel for 16 and for 128, other counts only some. 64 heads are four sequences
of 16 that share their keys, and a last group that is not full is filled with zeros."""
WHOLE = 128
SPLITS = 8
"""Parts into which every sequence's keys are cut. AITER itself takes 1 to 16, by the batch."""
_ROWS = 128
_INDICES = 1 << 22
"""Queries, and places in the list of keys, that one call takes at most: they bound its buffers to 70 and 50 MB."""


def attend(library: Aiter, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """q [T, H, 576] bfloat16, pages [num_pages, page_size, 576] bfloat16, entries as latent and then rotated key ->
    [T, H, 512] bfloat16. Waits for nothing; rows whose pages are missing are undefined."""
    tokens, heads, width = q.shape
    if heads != WHOLE and heads % GROUP:
        q = pad(q, (0, 0, 0, GROUP - heads % GROUP))
    size = q.shape[1] if q.shape[1] == WHOLE else GROUP
    copies = q.shape[1] // size
    grouped, buffer = q.reshape(tokens * copies, size, width), pages.view(-1, 1, 1, width)
    out = q.new_empty(tokens * copies, size, LATENT)
    capacity = batch.page_table.shape[1] * pages.shape[1]
    step = max(1, min(_ROWS, _INDICES // max(1, capacity * copies)))
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        starts, slots = key_lists(batch, rows, pages.shape[1], copies)
        sequences = len(starts) - 1
        each = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
        part = slice(rows.start * copies, rows.stop * copies)
        library.call(
            "mla_decode_fwd",
            q=grouped[part],
            kv_buffer=buffer,
            o=out[part],
            qo_indptr=each,
            kv_indptr=starts,
            kv_indices=slots,
            kv_last_page_lens=torch.ones(sequences, dtype=torch.int32, device=q.device),
            max_seqlen_q=1,
            sm_scale=scale,
            num_kv_splits=SPLITS,
            num_kv_splits_indptr=each * SPLITS,
        )
    return out.view(tokens, -1, LATENT)[:, :heads]


def key_lists(batch: PagedBatch, rows: slice, page_size: int, copies: int) -> tuple[Tensor, Tensor]:
    """The slots of the keys that each query of `rows` sees, each list `copies` times, one after the other.

    -> where lists begin and end [N + 1] int32, and the lists int32, with zeros behind the last one: how long they are
    in all is known to the device alone. Pages of 1 token, because not every release counts larger ones rightly."""
    device = batch.positions.device
    queries = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    owner = torch.searchsorted(batch.query_start[1:], queries, right=True).clamp_(max=len(batch.page_table) - 1)
    inside = torch.arange(page_size, dtype=torch.int32, device=device)
    slots = (batch.page_table[owner].clamp_(min=0)[..., None] * page_size + inside).flatten(1)
    slots, seen = slots.repeat_interleave(copies, 0), (batch.positions[rows] + 1).repeat_interleave(copies)
    starts = torch.zeros(len(seen) + 1, dtype=torch.int32, device=device)
    torch.cumsum(seen, 0, out=starts[1:])
    column = torch.arange(slots.shape[1], device=device)
    place = torch.where(column < seen[:, None], starts[:-1, None] + column, slots.numel())
    lists = torch.zeros(slots.numel() + 1, dtype=torch.int32, device=device)
    return starts, lists.scatter_(0, place.flatten(), slots.flatten())[:-1]


__all__ = ["GROUP", "LATENT", "ROPE", "SPLITS", "attend", "key_lists"]
