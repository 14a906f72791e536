"""What an engine is started with: the checked values of `engine:` and `model:` in a configuration file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

from ..kernels.select import ACCELERATED, BACKENDS, check_expanding, check_kv_dtype, check_sources
from .linear_kinds import check_linear_kinds
from .model.prompt_attention import PROMPT_ATTENTIONS, PromptAttention
from .stage_program import ATTENTIONS, Attention

TRANSPORTS = ("auto", "ipc", "tcp")
WEIGHTS = ("checkpoint", "random")
FLUSH_TIMEOUT_S = 600.0
"""How long a stopping engine may take to have its statistics on the disk."""
CPU_KV_MEMORY = 256 << 20
GPU_MEMORY_UTILIZATION = 0.9


@dataclass(frozen=True)
class EngineConfig:
    """One engine: a router and `shards` shard actors.

    model_path: folder of a checkpoint, the same on every node. name: the engine's name in messages and figures.
    precision: "auto" (as on disk) or a format that the checkpoint can be loaded as.
    weights: "checkpoint", or "random", to measure with: of the model's folder only config.json is read, the weights are
        made where they are used, the routed experts in the format that precision then names (`random_shard`).
    attention: "data_parallel": a sequence lives on one shard, which computes all of its attention; or
        "tensor_parallel": each shard computes some of the heads of all sequences, and some of the logits, and has the
        KV pages of all: for a few sequences at once. Answers are equal to the bit. One shard has nothing to divide.
    prompt_attention: "absorbed", for every row; or "expanded", with a key and a value for each head, for a prompt's
        rows in steps that have enough of them (`least_expanded_rows`): faster, but a text may then depend by rounding
        on how its prompt was cut, cached or replayed, and on the number of shards with tensor-parallel attention.
    shards: actors that the experts and sequences are spread over. threads_per_shard: compute threads of each; on CPU
        also the CPUs that Ray reserves for it. backend: the kernels, of `BACKENDS`; a shard of an accelerated one has a
        GPU to itself, which Ray reserves.
    kernels: for a backend that is composed of sources, operations with the sources that may run them, in their order
        (`composition.SourceOrder`).
    page_size: tokens a KV page. kv_pages: pages a shard; 0: as many as fit the memory that the next two give.
    kv_memory_bytes: of each shard's KV pages; 0: 256 MiB on CPUs, on GPUs what gpu_memory_utilization leaves.
    gpu_memory_utilization: the part of its GPU's memory that a shard's weights and KV pages may fill together; the
        rest is for what a step computes. 0: 0.9. kv_dtype: of KV pages, "f32", "bf16" (triton alone), "int8" or "fp8"
        (the latent in 8 bits with a scale a token, the rotated key in bfloat16), or "auto", the backend's own.
    max_batch_tokens: tokens of one step, of all sequences of a shard; longer prompts are prefilled in chunks.
    max_sequences: sequences that run at once, on all shards together; more wait.
    context_length: most tokens of a prompt and its continuation; 0: the model's.
    prefix_cache: whether sequences that begin alike share KV pages, so that what they share is computed once; not while
        statistics are gathered, nor for requests that score their prompt.
    int8_weights: kinds of bfloat16 weights that become INT8 while they are loaded, of "attention", "shared" (experts),
        "dense" (MLPs) and "head"; their activations are then quantized per token. int4_weights: kinds that become INT4
        in groups of 32 with integer multipliers, as `w4a8` experts, instead; never a kind that is INT8 on disk.
    redundant_experts: slots on each shard, in every layer, for experts that other shards hold too; of the experts with
        the most load once they are moved, which is every rebalance_interval_s, if that evens out the load; 0: never.
    transport: "ipc" (one node), "tcp", or "auto": Unix sockets where everything is on one node, else TCP with keys.
    start_timeout_s: from placement to ready. placement_timeout_s: how long to wait for reserved resources to be free.
    step_timeout_s: a step that takes longer has lost a shard. silence_s: a TCP peer silent for so long is gone, as with
        a machine without power or network; a process that ends is seen at once.
    shard_restarts: how often within 5 minutes a shard that is lost is started again, while the others keep their
        weights and requests wait; one more ends the engine. 0: the first. Where statistics are gathered each one does.
    statistics: absolute path, the same on every node, of a folder to gather activation statistics in while the engine
        runs (`StatisticsPlan`), complete when it has stopped; "" for none. moments_block: columns of the diagonal
        blocks of their second moments, 0 for none.
    """

    model_path: str
    name: str = "engine"
    precision: str = "auto"
    weights: str = "checkpoint"
    shards: int = 1
    attention: Attention = "data_parallel"
    prompt_attention: PromptAttention = "absorbed"
    threads_per_shard: int = 1
    backend: str = "cpu"
    kernels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    page_size: int = 16
    kv_pages: int = 0
    kv_memory_bytes: int = 0
    gpu_memory_utilization: float = 0.0
    kv_dtype: str = "auto"
    max_batch_tokens: int = 512
    max_sequences: int = 64
    context_length: int = 0
    prefix_cache: bool = True
    int8_weights: tuple[str, ...] = ()
    int4_weights: tuple[str, ...] = ()
    redundant_experts: int = 0
    rebalance_interval_s: float = 0.0
    transport: str = "auto"
    start_timeout_s: float = 600.0
    placement_timeout_s: float = 20.0
    step_timeout_s: float = 60.0
    silence_s: float = 4.0
    shard_restarts: int = 3
    statistics: str = ""
    moments_block: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError with the name of a field that makes no sense and what would."""
        if not self.model_path:
            raise ValueError("model_path: empty; name the folder of a checkpoint")
        if not self.name:
            raise ValueError("name: empty; the engine needs a name")
        self._at_least(1, "shards", "threads_per_shard", "page_size", "max_batch_tokens", "max_sequences")
        self._at_least(
            0,
            "kv_pages",
            "kv_memory_bytes",
            "context_length",
            "moments_block",
        )
        self._at_least(0, "redundant_experts", "rebalance_interval_s", "shard_restarts")
        self._positive("start_timeout_s", "placement_timeout_s", "step_timeout_s", "silence_s")
        check_linear_kinds(self.int8_weights, self.int4_weights)
        self._one_of("backend", BACKENDS)
        self._one_of("weights", WEIGHTS)
        self._one_of("attention", ATTENTIONS)
        self._one_of("prompt_attention", PROMPT_ATTENTIONS)
        if self.prompt_attention == "expanded":
            check_expanding(self.backend, self.kv_dtype)
        check_kv_dtype(self.backend, self.kv_dtype)
        check_sources(self.backend, [name for _, names in self.kernels for name in names])
        self._one_of("transport", TRANSPORTS)
        self._check_gpu_memory()
        if self.statistics and not os.path.isabs(self.statistics):
            raise ValueError(f"statistics: {self.statistics!r} is not an absolute path, which the shards need")
        for field in ("redundant_experts", "rebalance_interval_s"):
            if getattr(self, field) and self.shards == 1:
                raise ValueError(f"{field}: {getattr(self, field)}, but 1 shard holds every expert; 0 is right")
            if getattr(self, field) and self.statistics:
                raise ValueError(f"{field}: {getattr(self, field)}, but statistics are gathered of experts that stay")
        if self.weights == "random" and self.statistics:
            raise ValueError("statistics: there is nothing to learn of random weights")
        if self.attention == "tensor_parallel" and self.statistics:
            raise ValueError("statistics: with attention 'tensor_parallel' none are gathered; 'data_parallel' is right")
        if self.moments_block and not self.statistics:
            raise ValueError(f"moments_block: {self.moments_block}, but statistics names no folder to write them to")

    @property
    def answers(self) -> str:
        """What answers depend on: engines alike in it give the same, with however many shards; to the bit where prompts
        are absorbed."""
        names = (
            "model_path",
            "weights",
            "precision",
            "int8_weights",
            "int4_weights",
            "backend",
            "kernels",
            "page_size",
        )
        named = {name: getattr(self, name) for name in (*names, "kv_dtype", "prompt_attention")}
        return ", ".join(f"{name} {value}" for name, value in named.items() if value)

    @property
    def shard_bundle(self) -> dict[str, float]:
        """What Ray reserves for one shard."""
        return {"CPU": float(self.threads_per_shard)} | ({"GPU": 1.0} if self.backend in ACCELERATED else {})

    @property
    def kv_memory_share(self) -> float:
        """The part of a GPU's memory that weights and KV pages may fill; 0 where pages or bytes are given."""
        if self.backend not in ACCELERATED or self.kv_pages or self.kv_memory_bytes:
            return 0.0
        return self.gpu_memory_utilization or GPU_MEMORY_UTILIZATION

    def _check_gpu_memory(self) -> None:
        share = self.gpu_memory_utilization
        if not 0 <= share < 1:
            raise ValueError(f"gpu_memory_utilization: {share:g} is not a part of a GPU's memory, 0 to less than 1")
        if share and self.backend not in ACCELERATED:
            raise ValueError(
                f"gpu_memory_utilization: {share:g}, but the backend {self.backend!r} runs on CPUs; kv_memory is right"
            )
        if share and (self.kv_pages or self.kv_memory_bytes):
            raise ValueError(
                f"gpu_memory_utilization: {share:g}, but kv_pages or kv_memory_bytes says how large the KV cache is; "
                "one of them is right"
            )

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {least}")

    def _positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not a time above 0 s")

    def _one_of(self, name: str, values: tuple[str, ...]) -> None:
        if getattr(self, name) not in values:
            raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(values)}")


def expert_ranges(experts: int, shards: int) -> tuple[range, ...]:
    """The contiguous experts of each shard; the first `experts % shards` shards hold one more than the others.

    Raises ValueError with both numbers when a shard would be left without an expert.
    """
    if shards > experts:
        raise ValueError(f"shards: {shards} shards cannot share {experts} experts; at most {experts} shards")
    share, more = divmod(experts, shards)
    begins = [shard * share + min(shard, more) for shard in range(shards + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(begins))
