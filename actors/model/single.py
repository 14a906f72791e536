"""The whole model in one process, one sequence at a time: what oracle tests and the golden prompt run."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ...kernels.protocol import Chunk, Kernels, PagedBatch
from ..checkpoint import Checkpoint
from ..weights import load_shard
from .config import ModelConfig
from .kv_pages import KvPages
from .layer_weights import ShardWeights
from .prompt_attention import PromptAttention
from .stages import ModelStages


class SingleProcessModel:
    """Prefill, then decode token by token, with all experts here. Runs the same stages and kernels as a shard.

    weights must hold every routed expert. max_tokens: the longest sequence, prompt and answer together. page_size:
    tokens a KV page; results do not depend on it. prompt_attention: as of `ModelStages`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: ShardWeights,
        kernels: Kernels,
        max_tokens: int,
        page_size: int = 16,
        prompt_attention: PromptAttention = "absorbed",
    ) -> None:
        if weights.experts != tuple(range(config.n_routed_experts)):
            raise ValueError(f"weights hold experts {weights.experts}, all {config.n_routed_experts} are needed")
        if not 1 <= max_tokens <= config.max_position_embeddings:
            limit = config.max_position_embeddings
            raise ValueError(f"max_tokens {max_tokens} is not within 1..{limit} (max_position_embeddings)")
        self.config = config
        self.length = 0
        self._max_tokens = max_tokens
        self._kernels = kernels
        kv = KvPages.allocate(config, -(-max_tokens // page_size), page_size, kernels)
        self._stages = ModelStages(config, weights, kernels, kv, prompt_attention)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        precision: str,
        kernels: Kernels,
        max_tokens: int,
        int8_weights: Collection[str] = (),
        int4_weights: Collection[str] = (),
    ) -> SingleProcessModel:
        """Opens a checkpoint folder and loads all of it, as `load_shard`."""
        checkpoint = Checkpoint(path)
        config = ModelConfig.from_dict(checkpoint.config)
        every = range(config.n_routed_experts)
        weights = load_shard(
            checkpoint, config, precision, every, kernels, int8_weights=int8_weights, int4_weights=int4_weights
        )
        return SingleProcessModel(config, weights, kernels, max_tokens)

    def prefill(self, tokens: Sequence[int], chunk: int | None = None) -> Tensor:
        """Starts a new sequence with `tokens`, `chunk` of them a step (None: all) -> logits [T, V] of all positions."""
        if not tokens:
            raise ValueError("a prompt needs at least one token")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk {chunk} is below 1")
        self.length = 0
        step = len(tokens) if chunk is None else chunk
        return torch.cat([self._run(tokens[begin : begin + step]) for begin in range(0, len(tokens), step)])

    def decode(self, token: int) -> Tensor:
        """Appends one token -> logits [V] of what follows it."""
        if self.length == 0:
            raise ValueError("decode needs a prefill before it")
        return self._run([token])[0]

    def generate(self, tokens: Sequence[int], max_new: int, stop: Sequence[int] = ()) -> list[int]:
        """Greedy continuation of a prompt: up to max_new tokens, ended before a stop token."""
        logits = self.prefill(tokens)[-1]
        answer: list[int] = []
        while len(answer) < max_new:
            token = int(logits.argmax())
            if token in stop:
                break
            answer.append(token)
            if len(answer) < max_new:
                logits = self.decode(token)
        return answer

    def _run(self, tokens: Sequence[int]) -> Tensor:
        """One step over the next tokens of the sequence -> logits [T, V]."""
        if self.length + len(tokens) > self._max_tokens:
            raise ValueError(f"{self.length} + {len(tokens)} tokens exceed max_tokens {self._max_tokens}")
        ids = torch.tensor(tokens, dtype=torch.int64, device=self._kernels.device)
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise ValueError(
                f"tokens lie in {int(ids.min())}..{int(ids.max())}, vocab_size is {self.config.vocab_size}"
            )
        batch = self._batch(len(tokens))
        hidden = self._stages.embed(ids)
        for layer in range(self.config.num_hidden_layers):
            hidden = self._stages.attention(layer, hidden, batch)
            hidden = self._moe(layer, hidden) if layer in self.config.moe_layers else self._stages.dense(layer, hidden)
        self.length += len(tokens)
        return self._stages.head(hidden)

    def _moe(self, layer: int, hidden: Tensor) -> Tensor:
        stages, top_k = self._stages, self.config.num_experts_per_tok
        routing = stages.gate(layer, hidden)
        pair_token = torch.arange(hidden.shape[0], dtype=torch.int32, device=hidden.device).repeat_interleave(top_k)
        outputs = stages.experts(layer, routing.activations, pair_token, routing.ids.flatten())
        slots = outputs.unflatten(0, (hidden.shape[0], top_k))
        return stages.combine(layer, hidden, slots, routing.weights, stages.shared(layer, routing))

    def _batch(self, count: int) -> PagedBatch:
        """The next `count` positions; the sequence owns all pages, in order, so a slot is its position."""
        device, end = self._kernels.device, self.length + count
        positions = torch.arange(self.length, end, device=device)
        pages = torch.arange(self._stages.kv.num_pages, dtype=torch.int32, device=device)
        return PagedBatch(
            query_start=torch.tensor([0, count], dtype=torch.int32, device=device),
            context_len=torch.tensor([end], dtype=torch.int32, device=device),
            page_table=pages[None],
            positions=positions,
            slots=positions,
            chunks=(Chunk(0, 0, count, end),) if count > 1 else (),
        )
