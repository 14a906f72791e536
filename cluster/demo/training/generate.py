"""Greedy generation in batches, for scoring: left-padded prompts, a plain cache of keys and values."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import Model
from .vocabulary import EOS, IM_END, PAD

BUDGET = 1_000_000  # tokens of a batch, prompts and answers together
CHECK_EVERY = 16  # steps between looks at whether all have ended


@dataclass(frozen=True)
class Batch:
    """Prompts of a batch, left-padded: ids ``[b, t]`` and the number of pads before each ``[b]``."""

    ids: Tensor
    pads: Tensor
    longest_answer: int


def batch_of(prompts: list[list[int]], longest_answer: int, device: str) -> Batch:
    """Pads prompts on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    return Batch(ids, torch.tensor([width - len(prompt) for prompt in prompts], device=device), longest_answer)


class Decoder:
    """Runs a batch through the model piece by piece."""

    def __init__(self, model: Model, batch: Batch) -> None:
        sizes, (rows, width) = model.sizes, batch.ids.shape
        self.model, self.rows, self.length = model, rows, width + batch.longest_answer
        device, kind = batch.ids.device, model.embed(batch.ids[:1, 0]).dtype
        shape = (rows, sizes.num_attention_heads, self.length)
        self.keys = [torch.zeros(*shape, sizes.query_head_dim, device=device, dtype=kind) for _ in model.blocks]
        self.values = [torch.zeros(*shape, sizes.v_head_dim, device=device, dtype=kind) for _ in model.blocks]
        self.experts = [None if block.is_dense else block.experts(model.rounding) for block in model.blocks]
        self.real = torch.arange(self.length, device=device)[None] >= batch.pads[:, None]
        self.done = 0

    def forward(self, ids: Tensor) -> Tensor:
        """The next tokens' ids ``[b, t]`` to the last one's logits ``[b, vocab]``."""
        model, steps = self.model, ids.shape[1]
        places = torch.arange(self.done, self.done + steps, device=ids.device)
        end = self.done + steps
        seen = torch.arange(end, device=ids.device)
        mask = self.real[:, None, None, :end] & (seen <= places[:, None])
        mask = mask | (seen == places[:, None])  # pads see themselves: no NaN
        rotation = model.rotation(places.repeat(self.rows))
        x = model.embed(ids.reshape(-1))
        for index, block in enumerate(model.blocks):
            x = block.attended(x, self.attend(index, block.projections(x, *rotation), mask, end))
            experts = self.experts[index]
            x = block.dense(x) if experts is None else block.routed(x, *experts)[0]
        self.done = end
        return model.logits(x.view(self.rows, steps, -1)[:, -1])

    def attend(self, index: int, projections: tuple[Tensor, Tensor, Tensor], mask: Tensor, end: int) -> Tensor:
        """Attention over the cache ``[b * t, h * v]``."""
        q, k, v = (each.view(self.rows, -1, *each.shape[1:]).transpose(1, 2) for each in projections)
        self.keys[index][:, :, self.done : end] = k
        self.values[index][:, :, self.done : end] = v
        out = F.scaled_dot_product_attention(
            q, self.keys[index][:, :, :end], self.values[index][:, :, :end], attn_mask=mask
        )
        return out.transpose(1, 2).reshape(-1, out.shape[1] * out.shape[3])


@torch.no_grad()
def greedy(model: Model, batch: Batch) -> list[list[int]]:
    """The answers' ids, each up to its end of turn."""
    model.eval()
    decoder, ids = Decoder(model, batch), batch.ids
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    written: list[Tensor] = []
    for step in range(batch.longest_answer):
        best = torch.where(ended, PAD, decoder.forward(ids).argmax(-1))
        written.append(best)
        ended |= (best == IM_END) | (best == EOS)
        ids = best[:, None]
        if step % CHECK_EVERY == CHECK_EVERY - 1 and bool(ended.all()):
            break
    model.train()
    return [cut(row) for row in torch.stack(written, 1).tolist()]


def cut(ids: list[int]) -> list[int]:
    """Ids up to the first end."""
    ends = [ids.index(end) for end in (IM_END, EOS, PAD) if end in ids]
    return ids[: min(ends, default=len(ids))]


def answers(model: Model, prompts: list[list[int]], longest: list[int], device: str) -> list[list[int]]:
    """Answers of any number of prompts; ``longest`` bounds each answer's tokens."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + longest[i])
    found: list[list[int]] = [[] for _ in prompts]
    while order:
        taken, width, room = [], 0, 0
        while order:
            index = order[-1]
            wider, roomier = max(width, len(prompts[index])), max(room, longest[index])
            if taken and (wider + roomier) * (len(taken) + 1) > BUDGET:
                break
            width, room = wider, roomier
            taken.append(order.pop())
        rows = greedy(model, batch_of([prompts[i] for i in taken], room, device))
        for index, row in zip(taken, rows, strict=True):
            found[index] = row
    return found
