"""Tensor-parallel attention: which heads, and which part of the vocabulary, a shard computes for every row.

The latents are shared by all heads, so every shard keeps those of all sequences. What is sliced is sliced by rows of
the weights, [N, K] by N: each output stays one sum in one place, and results are equal to the bit for any number of
shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from .config import ModelConfig
from .tensors import TensorSpec

_SUFFIXES = ("weight", "weight_scale", "weight_zero_point")


@dataclass(frozen=True)
class TensorSlice:
    """One shard's. heads: of attention. vocabulary: tokens whose logits it computes."""

    heads: range
    vocabulary: range

    @staticmethod
    def all_of(config: ModelConfig, shards: int) -> tuple[TensorSlice, ...]:
        """Of every shard, as equal as can be. Raises ValueError for more shards than heads."""
        heads, tokens = config.num_attention_heads, config.vocab_size
        if shards > heads:
            raise ValueError(
                f"attention: 'tensor_parallel' gives each of {shards} shards a head at least, the model has "
                f"{heads}; at most {heads} shards, or 'data_parallel'"
            )
        return tuple(map(TensorSlice, _ranges(heads, shards), _ranges(tokens, shards)))

    def rows(self, config: ModelConfig) -> dict[str, range]:
        """By name, the rows of every tensor of which the shard reads only some; also of such as are not there."""
        return {f"{module}.{suffix}": rows for module, rows in self._modules(config) for suffix in _SUFFIXES}

    def _modules(self, config: ModelConfig) -> Iterator[tuple[str, range]]:
        yield "lm_head", self.vocabulary
        queries = _of_heads(self.heads, config.qk_head_dim)
        keys_values = _of_heads(self.heads, config.qk_nope_head_dim + config.v_head_dim)
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}.self_attn"
            yield f"{at}.{'q_proj' if config.q_lora_rank is None else 'q_b_proj'}", queries
            yield f"{at}.kv_b_proj", keys_values


def narrowed(spec: TensorSpec, rows: dict[str, range]) -> TensorSpec:
    """A tensor with as many rows as are read of it; rows: as `TensorSlice.rows`."""
    if spec.name not in rows:
        return spec
    return replace(spec, shapes=tuple((len(rows[spec.name]), *shape[1:]) for shape in spec.shapes))


def _of_heads(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)


def _ranges(count: int, parts: int) -> list[range]:
    """Contiguous; the first `count % parts` are longer by one."""
    share, more = divmod(count, parts)
    return [range(*pair) for pair in pairwise(part * share + min(part, more) for part in range(parts + 1))]
