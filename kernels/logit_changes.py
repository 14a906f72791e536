"""What changes a row's logits before a token is drawn: bias, penalties and bans, by vLLM's meaning and order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .protocol import LogitChanges, SamplingRow


def changed_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """logits [S, V] float32 -> the logits that tokens are drawn from, [S, V] float32; `logits` itself where no row has
    changes. A row depends on itself alone.

    In float64, rounded to float32 once: the bias is added; the repetition penalty divides positive and multiplies
    negative logits of all `seen` tokens; then frequency_penalty * count is taken off, and presence_penalty where the
    count is not 0. What leaves float32's range becomes its largest number; only bans make a logit -inf. Raises
    ValueError for a token outside the vocabulary.
    """
    if not any(row.changes for row in rows):
        return logits
    changed = logits.clone()
    for index, row in enumerate(rows):
        if row.changes is not None:
            changed[index] = _changed(logits[index], row.changes, index)
    return changed


def _changed(logits: Tensor, changes: LogitChanges, index: int) -> Tensor:
    """logits [V] float32 -> [V] float32. Only the tokens that are named are touched."""
    result, size = logits.clone(), logits.shape[0]
    for name, ids in (("bias", changes.bias_tokens), ("seen", changes.seen), ("banned", changes.banned)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(f"sample: changes.{name} of row {index} names a token outside the vocabulary of {size}")
    ids = torch.cat([changes.seen, changes.bias_tokens]).unique() if changes.bias_tokens.numel() else changes.seen
    given = logits[ids]
    values = given.to(torch.float64)
    if changes.bias_tokens.numel():
        values[torch.searchsorted(ids, changes.bias_tokens)] += changes.bias
        seen = torch.searchsorted(ids, changes.seen)
        values[seen] = _penalized(values[seen], changes)
    else:
        values = _penalized(values, changes)
    largest = torch.finfo(torch.float32).max
    rounded = values.clamp(-largest, largest).to(torch.float32)
    result[ids] = torch.where(given == -torch.inf, given, rounded)
    result[changes.banned] = -torch.inf
    return result


def _penalized(values: Tensor, changes: LogitChanges) -> Tensor:
    """The logits [n] float64 of the seen tokens, less what penalties take."""
    repeated = torch.where(values > 0, values / changes.repetition_penalty, values * changes.repetition_penalty)
    present = (changes.counts > 0).to(torch.float64)
    taken = changes.frequency_penalty * changes.counts + changes.presence_penalty * present
    return repeated - taken
