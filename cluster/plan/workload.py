"""What is to be planned for: a model in a format on some GPUs, and the load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ...actors.expert_format import ACTIVATIONS
from ...actors.model.config import ModelConfig
from ...actors.model.tensor_slice import TensorSlice
from ...kernels.kv_entries import entry_width
from ...kernels.protocol import ActivationFormat
from ...kernels.select import KV_DTYPES, device_kv_dtype
from ..weight_bytes import WeightBytes, weight_bytes

PLANNED_KV_DTYPES = tuple(word for word in KV_DTYPES if word != "auto")
"""Of the engine's `kv_dtype`; on a GPU "auto" is bf16."""


@dataclass(frozen=True)
class Workload:
    """format: of the routed experts in memory. int8_weights, int4_weights: as in `EngineConfig`. context: tokens that a
    decoding sequence has in the cache. prefill: tokens of a prompt. kv_dtype: of `PLANNED_KV_DTYPES`."""

    model: ModelConfig
    format: str
    int8_weights: tuple[str, ...]
    int4_weights: tuple[str, ...]
    context: int
    prefill: int
    kv_dtype: str = "bf16"

    def with_load(self, context: int, prefill: int) -> Workload:
        """The same model with other tokens in the cache and in a prompt."""
        return replace(self, context=context, prefill=prefill)

    @cached_property
    def weights(self) -> WeightBytes:
        """Of every kind, as they lie in a GPU's memory."""
        return weight_bytes(self.model, self.format, self.int8_weights, self.int4_weights, tiled=True)

    def sliced_weights(self, shards: int) -> WeightBytes:
        """With tensor-parallel attention, those of the shard that has the most. Raises ValueError for more shards than
        heads."""
        most = TensorSlice.all_of(self.model, shards)[0]
        return weight_bytes(self.model, self.format, self.int8_weights, self.int4_weights, True, most)

    @property
    def expert_activations(self) -> ActivationFormat:
        """What the routed experts multiply."""
        return ACTIVATIONS[self.format]

    def activations(self, word: str) -> ActivationFormat:
        """What a kind of `LINEAR_KINDS` multiplies."""
        rounded = word in self.int8_weights or word in self.int4_weights
        return ActivationFormat.INT8 if rounded else ActivationFormat.FLOAT

    @property
    def kv_entry_bytes(self) -> int:
        """One token in the cache of one layer."""
        dtype, model = device_kv_dtype(self.kv_dtype), self.model
        return entry_width(dtype, model.kv_lora_rank, model.qk_rope_head_dim) * dtype.itemsize

    @property
    def kv_token_bytes(self) -> int:
        """One token in the cache, over all layers."""
        return self.model.num_hidden_layers * self.kv_entry_bytes
