"""What an engine's configuration and its checkpoint's headers decide together, before any actor is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..kernels.composition import KernelPlan
from ..kernels.select import ACCELERATED, SOURCES, describe_kernels, device_kv_dtype, plan_kernels
from .checkpoint import Checkpoint, read_config
from .engine_config import CPU_KV_MEMORY, EngineConfig, expert_ranges
from .expert_placement import LayerPlacement
from .kernel_shapes import kernel_shapes, loaded_formats, loaded_linears, rounded_linears
from .model.config import ModelConfig
from .model.expert_matrix import MATRIX_KINDS
from .model.fields import ConfigError
from .model.kv_pages import KvPages
from .model.prompt_attention import least_expanded_rows
from .model.tensor_slice import TensorSlice
from .precision import precision_plan
from .quantization_config import MIXED
from .scheduler_config import SchedulerConfig
from .sequence import COLOCATED, DATA_PARALLEL, TENSOR_PARALLEL, StageProgram, sequence
from .statistics_plan import StatisticsPlan

MICRO_BATCHES = (1, 2)
"""Of the programs that an engine chooses from, where exchanges have room for several."""


@dataclass(frozen=True)
class EngineShape:
    """kv_pages: of each shard, at most: where its GPU's memory decides, it says how many when it has loaded its
    weights (`with_pages`). context_length: of prompt and answer together. placement: of every layer's
    experts at first.

    programs: what every shard runs, the first unless a plan names another. precision_plan: lines to print. kernel_plan:
    of a backend that is composed of sources. statistics: what is gathered, if anything is. tensor: every shard's slice
    with tensor-parallel attention, else none.
    """

    model: ModelConfig
    kv_pages: int
    context_length: int
    placement: LayerPlacement
    programs: tuple[StageProgram, ...]
    precision_plan: tuple[str, ...]
    kernel_plan: KernelPlan | None = None
    statistics: StatisticsPlan | None = None
    tensor: tuple[TensorSlice, ...] = ()

    @staticmethod
    def read(config: EngineConfig) -> EngineShape:
        """Reads headers only. Raises CheckpointError, ConfigError, PrecisionError or ValueError, naming what is wrong:
        a tensor, a field, a precision, more shards than experts, a cache of no page, too long a context, blocks of
        moments that do not fit."""
        model = _model_config(config.model_path)
        placement = LayerPlacement.contiguous(model.n_routed_experts, config.shards, config.redundant_experts)
        context = config.context_length or model.max_position_embeddings
        if context > model.max_position_embeddings:
            raise ValueError(
                f"context_length: {context} is more than the model's max_position_embeddings, "
                f"{model.max_position_embeddings}"
            )
        checkpoint = Checkpoint(config.model_path) if config.weights == "checkpoint" else None
        if checkpoint is None and config.precision not in MATRIX_KINDS:
            raise ValueError(
                f"precision: {config.precision!r} is no format of random weights; {', '.join(MATRIX_KINDS)} are"
            )
        tensor: tuple[TensorSlice, ...] = ()
        if config.attention == TENSOR_PARALLEL and config.shards > 1:
            tensor = TensorSlice.all_of(model, config.shards)
        chosen = _kernel_plan(config, model, checkpoint, max(placement.sizes), tensor)
        kernels = describe_kernels(config.backend, config.threads_per_shard, config.kv_dtype, chosen)
        pages = _pages(config, context, KvPages.page_bytes(model, config.page_size, kernels))
        attention = TENSOR_PARALLEL if tensor else DATA_PARALLEL
        # Captured exchanges between GPUs have one place for what travels, and what is alone need not travel.
        divided = config.backend not in ACCELERATED and config.shards > 1
        numbers = MICRO_BATCHES if divided else MICRO_BATCHES[:1]
        programs = tuple(sequence(model, COLOCATED, number, attention) for number in numbers)
        prompts = _prompt_lines(config, model)
        if checkpoint is None:
            lines = (f"random weights, routed experts in {config.precision}; nothing is read but config.json",)
            lines += (*prompts, *(chosen.lines() if chosen else ()))
            return EngineShape(model, pages, context, placement, programs, lines, chosen, tensor=tensor)
        plan = precision_plan(model, checkpoint, config.precision, kernels, config.int8_weights, config.int4_weights)
        if config.rebalance_interval_s and plan.memory == MIXED:
            _check_one_kind(checkpoint, model)
        statistics = None
        if config.statistics:
            ranges = expert_ranges(model.n_routed_experts, config.shards)
            statistics = StatisticsPlan.of(checkpoint, model, ranges, plan.memory, config.moments_block)
        lines = (*plan.lines(), *prompts)
        return EngineShape(model, pages, context, placement, programs, lines, chosen, statistics, tensor)

    @property
    def program(self) -> StageProgram:
        """The one of one micro-batch."""
        return self.programs[0]

    def with_pages(self, pages: Sequence[int]) -> EngineShape:
        """With as many pages as every shard has, `pages` of each."""
        return replace(self, kv_pages=min(pages))

    def longest_sequence(self, config: EngineConfig) -> int:
        """Tokens of the longest sequence that can run: of the context, or of all pages of a shard."""
        return min(self.context_length, self.kv_pages * config.page_size)

    def scheduler_config(self, config: EngineConfig, epoch: int) -> SchedulerConfig:
        """The scheduler's limits. While statistics are gathered every token runs once, and counts once."""
        return SchedulerConfig(
            engine=config.name,
            epoch=epoch,
            shards=1 if self.tensor else config.shards,  # all shards run the same plan
            num_pages=self.kv_pages,
            page_size=config.page_size,
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            context_length=self.context_length,
            vocab_size=self.model.vocab_size,
            program=self.program.name,
            prefix_cache=config.prefix_cache and self.statistics is None,
            preemption=self.statistics is None,
        )


def _prompt_lines(config: EngineConfig, model: ModelConfig) -> tuple[str, ...]:
    """What is told of expanded attention, if that is to run. Raises ValueError for a model where it saves nothing."""
    if config.prompt_attention == "absorbed":
        return ()
    line = f"prompts: {least_expanded_rows(model)} or more tokens of a sequence in a step attend with expanded keys and"
    return (f"{line} values; a text may depend by rounding on how its prompt was cut, cached or replayed",)


def _check_one_kind(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Experts of several kinds of matrix cannot take each other's place."""
    formats = checkpoint.formats
    for layer in model.moe_layers:
        found = {formats.matrix(layer, expert) for expert in range(model.n_routed_experts)}
        if len({MATRIX_KINDS[format] for format in found}) > 1:
            raise ValueError(
                f"rebalance_interval_s: layer {layer} of {checkpoint.path} has experts in {', '.join(sorted(found))}, "
                "which cannot take each other's place; 0 is right for it"
            )


def _model_config(path: str) -> ModelConfig:
    try:
        return ModelConfig.from_dict(read_config(path))
    except ConfigError as error:
        raise ConfigError(f"{path}/config.json: {error}") from None


def _kernel_plan(
    config: EngineConfig,
    model: ModelConfig,
    checkpoint: Checkpoint | None,
    local_experts: int,
    tensor: Sequence[TensorSlice],
) -> KernelPlan | None:
    """checkpoint: None for random weights."""
    if config.backend not in SOURCES:
        return None
    rounded = config.int8_weights, config.int4_weights
    formats = {config.precision} if checkpoint is None else loaded_formats(checkpoint, config.precision)
    linears = rounded_linears(*rounded) if checkpoint is None else loaded_linears(checkpoint, *rounded)
    kv_dtype = device_kv_dtype(config.kv_dtype)
    shapes = kernel_shapes(model, formats, linears, local_experts, kv_dtype, config.page_size, tensor)
    return plan_kernels(config.backend, config.kv_dtype, shapes, dict(config.kernels))


def _pages(config: EngineConfig, context_length: int, page_bytes: int) -> int:
    """Pages of a shard: as asked, or what fits the memory, but no more than its sequences can ever fill."""
    if config.kv_pages:
        return config.kv_pages
    useful = config.max_sequences * -(-context_length // config.page_size)
    if config.kv_memory_share:
        return useful
    memory = config.kv_memory_bytes or CPU_KV_MEMORY
    if memory < page_bytes:
        raise ValueError(f"kv_memory_bytes: {memory} holds no page, one takes {page_bytes} bytes")
    return min(memory // page_bytes, useful)
