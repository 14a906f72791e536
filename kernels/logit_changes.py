"""What changes a row's logits before a token is drawn: bias, penalties, bans and masks, by vLLM's meaning and order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .protocol import LogitChanges, SamplingRow


def changed_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [S, V] float32 -> the logits that tokens are drawn from, [S, V] float32; `logits` itself where no row has
    changes. A row depends on itself alone.

    In float64, rounded to float32 once: the bias is added; the repetition penalty divides positive and multiplies
    negative logits of all `seen` tokens; then frequency_penalty * count is taken off, and presence_penalty where the
    count is not 0. What leaves float32's range becomes its largest number; only bans and masks make a logit -inf.
    Raises ValueError for a token outside the vocabulary and a mask that does not cover it.
    """
    if not any(row.changes for row in rows):
        return logits
    changed = logits.clone()
    for index, row in enumerate(rows):
        if row.changes is not None:
            _change(changed[index], row.changes, index)
    return changed


def _change(row: Tensor, changes: LogitChanges, index: int) -> None:
    """Changes one row of logits, [V] float32, where it is. But for the mask only tokens that are named are touched."""
    size = row.shape[0]
    for name, ids in (("bias", changes.bias_tokens), ("seen", changes.seen), ("banned", changes.banned)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(f"sample: changes.{name} of row {index} names a token outside the vocabulary of {size}")
    if changes.seen.numel() or changes.bias_tokens.numel():
        _change_named(row, changes)
    if changes.banned.numel():
        row[changes.banned] = -torch.inf
    if changes.allowed is not None:
        if changes.allowed.shape[0] * 32 < size:
            covered = changes.allowed.shape[0] * 32
            raise ValueError(f"sample: changes.allowed of row {index} covers {covered} tokens, expected {size}")
        row.masked_fill_(_forbidden(changes.allowed, size), -torch.inf)


def _change_named(row: Tensor, changes: LogitChanges) -> None:
    """Adds the bias and takes the penalties."""
    ids = torch.cat([changes.seen, changes.bias_tokens]).unique() if changes.bias_tokens.numel() else changes.seen
    given = row[ids]
    values = given.to(torch.float64)
    if changes.bias_tokens.numel():
        values[torch.searchsorted(ids, changes.bias_tokens)] += changes.bias
        seen = torch.searchsorted(ids, changes.seen)
        values[seen] = _penalized(values[seen], changes)
    else:
        values = _penalized(values, changes)
    largest = torch.finfo(torch.float32).max
    rounded = values.clamp(-largest, largest).to(torch.float32)
    row[ids] = torch.where(given == -torch.inf, given, rounded)


def _forbidden(allowed: Tensor, size: int) -> Tensor:
    """The bits of a mask that are 0 -> [size] bool."""
    if allowed.device.type == "cpu":  # a tenth of the time of what torch has for it
        bits = np.unpackbits((~allowed).numpy().view(np.uint8), bitorder="little", count=size)
        return torch.from_numpy(bits.view(np.bool_))
    places = torch.arange(32, dtype=allowed.dtype, device=allowed.device)
    return ((allowed[:, None] >> places) & 1).view(-1)[:size] == 0


def _penalized(values: Tensor, changes: LogitChanges) -> Tensor:
    """The logits [n] float64 of the seen tokens, less what penalties take."""
    repeated = torch.where(values > 0, values / changes.repetition_penalty, values * changes.repetition_penalty)
    present = (changes.counts > 0).to(torch.float64)
    taken = changes.frequency_penalty * changes.counts + changes.presence_penalty * present
    return repeated - taken
