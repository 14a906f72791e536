"""The latent KV cache of one shard, in pages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...kernels.kv_entries import entry_width
from ...kernels.protocol import Kernels
from .config import ModelConfig
from .weight_memory import WeightMemory


@dataclass(frozen=True)
class KvPages:
    """values: [layers, num_pages, page_size, W] in the backend's `kv_dtype`; a page number is one for all layers. An
    entry is the normed latent (L values) and the rotated shared key (R values) of one token, W words as the backend's
    `write_kv` lays them out."""

    values: Tensor

    @property
    def num_pages(self) -> int:
        """Pages in the cache."""
        return self.values.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.values.shape[2]

    @staticmethod
    def allocate(config: ModelConfig, num_pages: int, page_size: int, kernels: Kernels) -> KvPages:
        """Zeroed pages on the backend's device. Raises ValueError for sizes below 1."""
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a KV cache needs at least one page of one token, not {num_pages} of {page_size}")
        shape = (config.num_hidden_layers, num_pages, page_size, _entry_width(config, kernels))
        return KvPages(WeightMemory(kernels.device).zeros(kernels.kv_dtype, *shape))

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, kernels: Kernels) -> int:
        """Bytes that one page takes over all layers, to size a cache by memory."""
        return config.num_hidden_layers * page_size * _entry_width(config, kernels) * kernels.kv_dtype.itemsize


def _entry_width(config: ModelConfig, kernels: Kernels) -> int:
    return entry_width(kernels.kv_dtype, config.kv_lora_rank, config.qk_rope_head_dim)
