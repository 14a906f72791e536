"""Causal attention inside documents: packed rows whose documents do not see each other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Attention
from .vocabulary import EOS

SHORTEST_MEAN = 64  # tokens a document on average, at the least


def document_ends(tokens: Tensor, length: int) -> Tensor:
    """Flat ``tokens [rows * length]`` to the documents' starts and the end ``[rows * length / 64 + 1] i32``.

    Places for documents that are not there hold the end.
    """
    total = tokens.shape[0]
    starts = torch.zeros(total, dtype=torch.bool, device=tokens.device)
    starts[1:] = tokens[:-1] == EOS
    starts[::length] = True
    places = torch.nonzero_static(starts, size=total // SHORTEST_MEAN, fill_value=total).view(-1).to(torch.int32)
    return torch.cat([places, torch.full((1,), total, dtype=torch.int32, device=tokens.device)])


def packed_attention(tokens: Tensor, length: int) -> Attention:
    """Attention over packed rows; on a GPU by variable lengths, elsewhere by a mask."""
    return varlen(tokens, length) if tokens.is_cuda else masked(tokens, length)


def varlen(tokens: Tensor, length: int) -> Attention:
    """PyTorch's variable-length kernel; v is padded to the width of q and k."""
    from torch.nn.attention.varlen import varlen_attn

    ends = document_ends(tokens, length)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        padded = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
        out = varlen_attn(q, k, padded, ends, ends, length, length, window_size=(-1, 0))
        if isinstance(out, tuple):
            raise TypeError(f"varlen_attn returned {len(out)} tensors; without return_aux it returns the output alone")
        return out[..., : v.shape[-1]].reshape(out.shape[0], -1)

    return attention


def masked(tokens: Tensor, length: int) -> Attention:
    """The same with a mask ``[rows, 1, length, length]``."""
    rows = tokens.view(-1, length)
    is_end = (rows == EOS).long()
    document = is_end.cumsum(1) - is_end
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.view(-1, length, *each.shape[1:]).transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).reshape(tokens.shape[0], -1)

    return attention
