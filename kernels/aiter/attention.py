"""MLA attention over latent pages by AITER's decode kernel, prompts too.

Every query is a sequence of its own, in one call with a number of splits that is always the same: what a query's bits
depend on is then its own entries alone, however a prompt was cut, and a token computed again in a prompt gets the bits
of its decoding. AITER's prefill kernel sums in another order, and its own choice of splits depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import pad

from ..protocol import PagedBatch
from .key_lists import KeyLists
from .package import Aiter

Lists = Callable[[PagedBatch, slice, int, int, int], KeyLists]
"""Lists the keys of queries: batch, which queries, tokens a page, copies of each, splits."""

LATENT, ROPE = 512, 64
"""The only sizes of an entry that the assembly has."""
GROUP = 16
"""Heads a call sees: every release has a kernel for 16 and for 128, other counts only some. 64 heads are four sequences
of 16 that share their keys, and a last group that is not full is filled with zeros. So are 128: one kernel for all
counts gives a head the same bits whatever heads a shard has beside it."""
SPLITS = 8
"""Parts into which every sequence's keys are cut. AITER itself takes 1 to 16, by the batch."""
ROWS = 128
_INDICES = 1 << 25
"""Queries, and places in the lists of keys, that one call takes at most: each bounds a buffer to 134 MB at 64 heads."""


def attend(library: Aiter, lists: Lists, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """q [T, H, 576] bfloat16, pages [num_pages, page_size, 576] bfloat16, entries as latent and then rotated key ->
    [T, H, 512] bfloat16. lists: such as `key_lists`. Waits for nothing; rows whose pages are missing are undefined."""
    tokens, heads, width = q.shape
    if heads % GROUP:
        q = pad(q, (0, 0, 0, GROUP - heads % GROUP))
    copies = q.shape[1] // GROUP
    grouped, buffer = q.reshape(tokens * copies, GROUP, width), pages.view(-1, 1, 1, width)
    out = q.new_empty(tokens * copies, GROUP, LATENT)
    capacity = batch.page_table.shape[1] * pages.shape[1]
    step = max(1, min(ROWS, _INDICES // max(1, capacity * copies)))
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        part, keys = slice(rows.start * copies, rows.stop * copies), lists(batch, rows, pages.shape[1], copies, SPLITS)
        library.call(
            "mla_decode_fwd",
            q=grouped[part],
            kv_buffer=buffer,
            o=out[part],
            qo_indptr=keys.queries,
            kv_indptr=keys.starts,
            kv_indices=keys.slots,
            kv_last_page_lens=keys.last_lengths,
            max_seqlen_q=1,
            sm_scale=scale,
            num_kv_splits=SPLITS,
            num_kv_splits_indptr=keys.splits,
        )
    return out.view(tokens, -1, LATENT)[:, :heads]


__all__ = ["GROUP", "LATENT", "ROPE", "SPLITS", "Lists", "attend"]
