"""Which tensors a checkpoint must hold, by the published names, with their shapes and dtypes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ...kernels.formats import GROUP_SIZE, PACK
from ..checkpoint import Checkpoint, CheckpointError
from ..weight_formats import WeightFormats
from .config import ModelConfig

Shape = tuple[int, ...]

_WIDE = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor. kind: the row of the precision plan it counts to. shapes and dtypes: what it may have. optional:
    some exporters leave it out."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    optional: bool = False

    @property
    def module(self) -> str:
        """The name without its last part."""
        return self.name.rpartition(".")[0]


def shard_tensors(config: ModelConfig, formats: WeightFormats, experts: Sequence[int]) -> Iterator[TensorSpec]:
    """All tensors that a shard with these experts reads, layer by layer."""
    yield from outer_tensors(config)
    for layer in range(config.num_hidden_layers):
        for spec in (*attention_tensors(config, layer), *mlp_tensors(config, layer)):
            yield from _in_int8(spec) if spec.module in formats.int8_linears else (spec,)
        if layer in config.moe_layers:
            for expert in experts:
                yield from routed_tensors(config, layer, expert, formats.matrix(layer, expert))


def routed_tensors(config: ModelConfig, layer: int, expert: int, disk: str) -> Iterator[TensorSpec]:
    """All tensors of one routed expert in a disk format."""
    for matrix, shape in expert_shapes(config).items():
        yield from expert_tensors(f"model.layers.{layer}.mlp.experts.{expert}.{matrix}", shape, disk)


def outer_tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """Embedding, last norm and head."""
    table = (config.vocab_size, config.hidden_size)
    yield _weight("model.embed_tokens", "embedding", *table)
    yield _weight("model.norm", "norms", config.hidden_size)
    yield _weight("lm_head", "lm_head", *table)


def attention_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """A layer's attention with all norms of the layer, not quantized."""
    at, hidden, heads = f"model.layers.{layer}", config.hidden_size, config.num_attention_heads
    yield _weight(f"{at}.input_layernorm", "norms", hidden)
    yield _weight(f"{at}.post_attention_layernorm", "norms", hidden)
    at, queries, rank = f"{at}.self_attn", heads * config.qk_head_dim, config.q_lora_rank
    if rank is None:
        yield _weight(f"{at}.q_proj", "attention", queries, hidden)
    else:
        yield _weight(f"{at}.q_a_proj", "attention", rank, hidden)
        yield _weight(f"{at}.q_a_layernorm", "norms", rank)
        yield _weight(f"{at}.q_b_proj", "attention", queries, rank)
    keys_values = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield _weight(f"{at}.kv_a_proj_with_mqa", "attention", config.kv_width, hidden)
    yield _weight(f"{at}.kv_a_layernorm", "norms", config.kv_lora_rank)
    yield _weight(f"{at}.kv_b_proj", "attention", keys_values, config.kv_lora_rank)
    yield _weight(f"{at}.o_proj", "attention", hidden, heads * config.v_head_dim)


def mlp_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """A layer's dense MLP, or its gate and shared experts, not quantized."""
    at, hidden = f"model.layers.{layer}.mlp", config.hidden_size
    if layer not in config.moe_layers:
        yield from _gated_mlp(at, "dense MLP", config.intermediate_size, hidden)
        return
    yield _weight(f"{at}.gate", "gate", config.n_routed_experts, hidden)
    yield TensorSpec(f"{at}.gate.e_score_correction_bias", "gate bias", ((config.n_routed_experts,),), _WIDE)
    shared = config.moe_intermediate_size * config.n_shared_experts
    yield from _gated_mlp(f"{at}.shared_experts", "shared experts", shared, hidden)


def expert_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of a routed expert's matrices."""
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    return {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}


def expert_tensors(name: str, shape: tuple[int, int], disk: str) -> Iterator[TensorSpec]:
    """The tensors of one expert matrix `name` of [N, K] in a disk format (one of `formats.FORMATS`).

    Raises CheckpointError when K does not divide into the format's groups or packs.
    """
    rows, columns = shape
    kind = "routed experts down" if name.endswith("down_proj") else "routed experts gate/up"

    def spec(suffix: str, dtype: torch.dtype | tuple[torch.dtype, ...], *shapes: Shape, optional: bool = False):
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
        return TensorSpec(f"{name}.{suffix}", kind, shapes, dtypes, optional)

    if disk in ("w4a16", "w4a8"):
        group = GROUP_SIZE if disk == "w4a16" else 2 * GROUP_SIZE
        _expect_multiple(name, columns, group, disk)
        yield spec("weight_packed", torch.int32, (rows, columns // PACK))
        yield spec("weight_shape", (torch.int32, torch.int64), (2,), optional=True)
        if disk == "w4a16":
            yield spec("weight_scale", torch.bfloat16, (rows, columns // GROUP_SIZE))
        else:
            yield spec("weight_multiplier", torch.uint8, (rows, columns // group))
            yield spec("weight_scale", torch.float32, (rows,))
    elif disk == "w8a8":
        yield spec("weight", torch.int8, shape)
        yield spec("weight_scale", torch.float32, (rows,))
        yield spec("weight_zero_point", torch.int8, (rows,), optional=True)
    elif disk == "w8a8-fp8":
        yield spec("weight", torch.float8_e4m3fn, shape)
        yield spec("weight_scale", _WIDE, (rows,))
    elif disk == "w4a8-channel":
        _expect_multiple(name, columns, PACK, disk)
        yield spec("weight", torch.int32, (rows, columns // PACK))
        yield spec("weight_scale", torch.float32, (), (1,))
        yield spec("weight_scale_2", torch.float32, (rows,))
    elif disk == "bf16":
        yield spec("weight", torch.bfloat16, shape)
    else:
        raise ValueError(f"unknown expert format {disk!r}")


def check_tensors(checkpoint: Checkpoint, specs: Iterable[TensorSpec]) -> int:
    """Checks every tensor by the files' headers alone and returns their bytes together.

    Raises CheckpointError naming tensor, file and what was expected.
    """
    total = 0
    for spec in specs:
        if spec.optional and not checkpoint.has(spec.name):
            continue
        entry = checkpoint.expect(spec.name, spec.dtypes, spec.shapes[0] if len(spec.shapes) == 1 else None)
        if entry.shape not in spec.shapes:
            expected = " or ".join(str(list(shape)) for shape in spec.shapes)
            raise CheckpointError(
                f"{entry.file}: tensor {spec.name} has shape {list(entry.shape)}, expected {expected}"
            )
        total += entry.bytes
    return total


def _in_int8(spec: TensorSpec) -> Iterator[TensorSpec]:
    """The tensors of a linear in INT8, from its weight's. Quark writes zero points, of zero, when it exports a model
    from memory."""
    at, rows = spec.module, (spec.shapes[0][0],)
    yield replace(spec, dtypes=(torch.int8,))
    yield TensorSpec(f"{at}.weight_scale", spec.kind, (rows,), (torch.float32,))
    yield TensorSpec(f"{at}.weight_zero_point", spec.kind, (rows,), (torch.int8,), optional=True)


def _weight(name: str, kind: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", kind, (shape,), _WIDE)


def _gated_mlp(name: str, kind: str, inner: int, hidden: int) -> Iterator[TensorSpec]:
    yield _weight(f"{name}.gate_proj", kind, inner, hidden)
    yield _weight(f"{name}.up_proj", kind, inner, hidden)
    yield _weight(f"{name}.down_proj", kind, hidden, inner)


def _expect_multiple(name: str, columns: int, multiple: int, disk: str) -> None:
    if columns % multiple:
        raise CheckpointError(f"{name}: {columns} columns are not a multiple of {multiple}, which {disk} needs")
