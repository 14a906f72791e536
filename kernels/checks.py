"""Argument checks that every kernel backend shares: dtype, shape, device and contiguity, by argument name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .kv_entries import entry_width
from .protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    Chunk,
    ExpertMatrix,
    ExpertWeights,
    GateConfig,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    IntegerWeight,
    LayerExperts,
    PagedBatch,
    activation_format,
)

INT4_GROUP = 32
MAX_INT8_INNER = (2**31 - 1) // (127 * 128)
"""The largest K whose sum of INT8 products is sure to fit an int32."""


@dataclass(frozen=True)
class PairShapes:
    """Sizes of one `experts` call: T rows, P pairs, E local experts, D hidden and I intermediate size."""

    tokens: int
    pairs: int
    experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class ExpandedShapes:
    """Sizes of one `expanded_attention` call: H heads, L and R of an entry, A + R of a head's query, V of its value."""

    heads: int
    rank: int
    inner: int
    rope: int
    value: int


class LaidOutMatrix(Protocol):
    """A `PreparedMatrix` that tells its sizes E, N and K."""

    @property
    def kind(self) -> type[ExpertMatrix]: ...

    @property
    def experts(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def inner(self) -> int: ...


class ArgumentChecks:
    """Refuses with a ValueError what a backend with this activation dtype and device cannot run.

    Each method checks one operation's arguments and returns the sizes that the operation needs.
    """

    def __init__(
        self,
        activation_dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype = torch.float32,
        query_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._float, self._kv, self._query = (activation_dtype,), kv_dtype, query_dtype
        self._weight = (torch.bfloat16, torch.float32)
        self._device = device.type

    def rms_norm(self, x: Tensor, weight: Tensor) -> tuple[int, int]:
        tokens, size = self._shape("rms_norm", "x", x, 2)
        self._require_columns("rms_norm", "x", x, self._float, (tokens, size))
        self._require("rms_norm", "weight", weight, (*self._float, torch.bfloat16), (size,))
        return tokens, size

    def linear(
        self, op: str, x: Tensor | Activations, weight: Tensor, residual: Tensor | None = None
    ) -> tuple[int, int, int]:
        """T, K and N."""
        if isinstance(x, Activations):
            raise ValueError(f"{op}: x is {x.format.value} Activations, expected a Tensor for a weight in floats")
        tokens, inner = self._shape(op, "x", x, 2)
        outputs = self._shape(op, "weight", weight, 2)[0]
        self._require(op, "x", x, self._float, (tokens, inner))
        self._require(op, "weight", weight, self._weight, (outputs, inner))
        self.residual(op, residual, tokens, outputs)
        return tokens, inner, outputs

    def integer_linear(
        self, x: Tensor | Activations, weight: IntegerWeight, residual: Tensor | None = None
    ) -> tuple[int, int, int]:
        """T, K and N."""
        if isinstance(x, Activations):
            tokens, inner = self._shape("linear", "x.values", x.values, 2)
            self._activations("linear", x, ActivationFormat.INT8, tokens, inner)
        else:
            tokens, inner = self._shape("linear", "x", x, 2)
            self._require("linear", "x", x, self._float, (tokens, inner))
        if isinstance(weight, Int4Weight):
            name, values = "weight.nibbles", weight.nibbles
            outputs = self._shape("linear", name, values, 2)[0]
            if inner % INT4_GROUP:
                raise ValueError(
                    f"linear: x has K = {inner}, not a multiple of {INT4_GROUP}, which weight needs in INT4"
                )
            self._require("linear", name, values, (torch.uint8,), (outputs, inner // 2))
            groups = (outputs, inner // INT4_GROUP)
            self._require("linear", "weight.multipliers", weight.multipliers, (torch.uint8,), groups)
        else:
            name, values = "weight.values", weight.values
            outputs = self._shape("linear", name, values, 2)[0]
            self._require("linear", name, values, (torch.int8,), (outputs, inner))
        self._require("linear", "weight.scale", weight.scale, (torch.float32,), (outputs,))
        if inner > MAX_INT8_INNER:
            raise ValueError(f"linear: {name} has K = {inner}; sums of more than {MAX_INT8_INNER} overflow int32")
        self.residual("linear", residual, tokens, outputs)
        return tokens, inner, outputs

    def residual(self, op: str, residual: Tensor | None, tokens: int, outputs: int) -> None:
        """What is added to a product, if anything."""
        if residual is not None:
            self._require(op, "residual", residual, self._float, (tokens, outputs))

    def head_linear(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """T, H, A and B."""
        tokens, heads, inner = self._shape("head_linear", "x", x, 3)
        outputs = self._shape("head_linear", "weight", weight, 3)[1]
        self._require_columns("head_linear", "x", x, self._float, (tokens, heads, inner))
        self._require("head_linear", "weight", weight, self._weight, (heads, outputs, inner))
        return tokens, heads, inner, outputs

    def rotation(self, op: str, size: int, tokens: int, positions: Tensor, cos: Tensor, sin: Tensor) -> int:
        """Of the last `size` columns of what the operation rotates; the length of the tables."""
        if size % 2:
            raise ValueError(f"{op}: {size} columns are rotated, which are not pairs")
        length = self._shape(op, "cos", cos, 2)[0]
        self._require(op, "positions", positions, (torch.int64,), (tokens,))
        self._require(op, "cos", cos, (torch.float32,), (length, size // 2))
        self._require(op, "sin", sin, (torch.float32,), (length, size // 2))
        return length

    def absorb(
        self, q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[int, int, int, int, int, int]:
        """T, H, A, L, R and the length of the tables."""
        width = self._shape("absorb", "q", q, 3)[2]
        inner = self._shape("absorb", "weight", weight, 3)[2]
        if inner >= width:
            raise ValueError(f"absorb: q is {_describe(q)}, expected more columns than the {inner} of weight")
        tokens, heads, _, outputs = self.head_linear(q[..., :inner], weight)
        length = self.rotation("absorb", width - inner, tokens, positions, cos, sin)
        return tokens, heads, inner, outputs, width - inner, length

    def write_kv(
        self, pages: Tensor, slots: Tensor, rows: Tensor, norm: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[int, int, int, int, int]:
        """T, L, R, the number of slots in `pages` and the length of the tables."""
        op = "write_kv"
        tokens, width = self._shape(op, "rows", rows, 2)
        rank = self._shape(op, "norm", norm, 1)[0]
        if rank >= width:
            raise ValueError(f"{op}: rows is {_describe(rows)}, expected more columns than the {rank} of norm")
        num_pages, page_size, _ = self._shape(op, "pages", pages, 3)
        self._require_columns(op, "rows", rows, self._float, (tokens, width))
        self._require(op, "norm", norm, (*self._float, torch.bfloat16), (rank,))
        words = entry_width(self._kv, rank, width - rank)
        self._require(op, "pages", pages, (self._kv,), (num_pages, page_size, words))
        self._require(op, "slots", slots, (torch.int64,), (tokens,))
        length = self.rotation(op, width - rank, tokens, positions, cos, sin)
        return tokens, rank, width - rank, num_pages * page_size, length

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, kv_lora_rank: int) -> tuple[int, int, int]:
        """T, H and L + R."""
        op = "mla_attention"
        tokens, heads, width = self._shape(op, "q", q, 3)
        num_pages, page_size, _ = self._shape(op, "pages", pages, 3)
        self._require(op, "q", q, tuple(dict.fromkeys((*self._float, self._query))), (tokens, heads, width))
        if not 0 < kv_lora_rank <= width:
            raise ValueError(f"{op}: kv_lora_rank is {kv_lora_rank}, expected 1 to {width}, the width of q")
        words = entry_width(self._kv, kv_lora_rank, width - kv_lora_rank)
        self._require(op, "pages", pages, (self._kv,), (num_pages, page_size, words))
        self._paged(op, batch, tokens)
        return tokens, heads, width

    def expanded_attention(
        self,
        q: Tensor,
        pages: Tensor,
        batch: PagedBatch,
        chunk: Chunk,
        up_key: Tensor,
        up_value: Tensor,
        cos: Tensor,
        sin: Tensor,
        out: Tensor,
    ) -> ExpandedShapes:
        """The sizes, and that the chunk lies within the batch's rows and its pages."""
        op = "expanded_attention"
        tokens, heads, width = self._shape(op, "q", q, 3)
        _, rank, inner = self._shape(op, "up_key", up_key, 3)
        value = self._shape(op, "up_value", up_value, 3)[1]
        num_pages, page_size, _ = self._shape(op, "pages", pages, 3)
        if inner >= width:
            raise ValueError(f"{op}: q is {_describe(q)}, expected more columns than the {inner} of up_key")
        self._require(op, "q", q, self._float, (tokens, heads, width))
        self._require(op, "up_key", up_key, self._weight, (heads, rank, inner))
        self._require(op, "up_value", up_value, self._weight, (heads, value, rank))
        words = entry_width(self._kv, rank, width - inner)
        self._require(op, "pages", pages, (self._kv,), (num_pages, page_size, words))
        self._require(op, "out", out, self._float, (tokens, heads * value))
        self.rotation(op, width - inner, tokens, batch.positions, cos, sin)
        sequences, max_pages = self._paged(op, batch, tokens)
        if not (0 <= chunk.sequence < sequences and chunk.first >= 0 and chunk.first + chunk.rows <= tokens):
            raise ValueError(f"{op}: {chunk} is not within {sequences} sequences of {tokens} rows")
        if not 0 < chunk.rows <= chunk.context <= max_pages * page_size:
            raise ValueError(f"{op}: {chunk} does not fit its {max_pages} pages of {page_size} tokens")
        return ExpandedShapes(heads, rank, inner, width - inner, value)

    def _paged(self, op: str, batch: PagedBatch, tokens: int) -> tuple[int, int]:
        """S and the columns of the page table."""
        sequences, max_pages = self._shape(op, "batch.page_table", batch.page_table, 2)
        self._require(op, "batch.page_table", batch.page_table, (torch.int32,), (sequences, max_pages))
        self._require(op, "batch.query_start", batch.query_start, (torch.int32,), (sequences + 1,))
        self._require(op, "batch.context_len", batch.context_len, (torch.int32,), (sequences,))
        self._require(op, "batch.positions", batch.positions, (torch.int64,), (tokens,))
        return sequences, max_pages

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[int, int, int]:
        """T, D and E."""
        tokens, inner, experts = self.linear("gate", x, weight)
        self._require("gate", "bias", bias, (torch.float32,), (experts,))
        check_gate_config(config, experts)
        return tokens, inner, experts

    def quantize(self, x: Tensor) -> tuple[int, int]:
        tokens, size = self._shape("quantize", "x", x, 2)
        self._require("quantize", "x", x, self._float, (tokens, size))
        return tokens, size

    def silu_mul(self, gate_up: Tensor) -> tuple[int, int]:
        """T and I."""
        tokens, size = self._shape("silu_mul", "gate_up", gate_up, 2)
        self._require("silu_mul", "gate_up", gate_up, self._float, (tokens, size))
        if size % 2:
            raise ValueError(f"silu_mul: gate_up has {size} columns, which are not two equal halves")
        return tokens, size // 2

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: ExpertWeights) -> PairShapes:
        if type(weights.gate_up) is not type(weights.down):
            raise ValueError(
                f"experts: weights.gate_up is a {type(weights.gate_up).__name__} and weights.down a "
                f"{type(weights.down).__name__}; both must be of one kind"
            )
        experts, double, hidden = self.expert_matrix("weights.gate_up", weights.gate_up)
        down_experts, outputs, intermediate = self.expert_matrix("weights.down", weights.down)
        if (down_experts, outputs, 2 * intermediate) != (experts, hidden, double):
            raise ValueError(
                f"experts: weights.gate_up is [{experts}, {double}, {hidden}] and weights.down "
                f"[{down_experts}, {outputs}, {intermediate}], expected [{experts}, {hidden}, {double // 2}]"
            )
        tokens = self._shape("experts", "x.values", x.values, 2)[0]
        self._activations("experts", x, activation_format(weights.gate_up), tokens, hidden)
        pairs = self._shape("experts", "pair_token", pair_token, 1)[0]
        self._require("experts", "pair_token", pair_token, (torch.int32,), (pairs,))
        self._require("experts", "pair_expert", pair_expert, (torch.int32,), (pairs,))
        return PairShapes(tokens, pairs, experts, hidden, intermediate)

    def prepared_experts(
        self, x: Activations, pair_token: Tensor, pair_expert: Tensor, gate_up: LaidOutMatrix, down: LaidOutMatrix
    ) -> PairShapes:
        """As `experts`, of weights that a backend's `prepare` has checked."""
        tokens = self._shape("experts", "x.values", x.values, 2)[0]
        self._activations("experts", x, activation_format(gate_up), tokens, gate_up.inner)
        pairs = self._shape("experts", "pair_token", pair_token, 1)[0]
        self._require("experts", "pair_token", pair_token, (torch.int32,), (pairs,))
        self._require("experts", "pair_expert", pair_expert, (torch.int32,), (pairs,))
        return PairShapes(tokens, pairs, gate_up.experts, down.rows, down.inner)

    def expert_matrix(self, name: str, matrix: ExpertMatrix) -> tuple[int, int, int]:
        """E, N and K of one expert matrix."""
        if isinstance(matrix, Int4Matrix):
            experts, rows, packed = self._shape("experts", f"{name}.nibbles", matrix.nibbles, 3)
            inner = 2 * packed
            if inner % INT4_GROUP:
                raise ValueError(f"experts: {name}.nibbles has K = {inner}, not a multiple of {INT4_GROUP}")
            self._require("experts", f"{name}.nibbles", matrix.nibbles, (torch.uint8,), (experts, rows, packed))
            groups = (experts, rows, inner // INT4_GROUP)
            self._require("experts", f"{name}.multipliers", matrix.multipliers, (torch.uint8,), groups)
            self._require("experts", f"{name}.scale", matrix.scale, (torch.float32,), (experts, rows))
            return experts, rows, inner
        experts, rows, inner = self._shape("experts", f"{name}.values", matrix.values, 3)
        dtype = torch.bfloat16
        if not isinstance(matrix, Bf16Matrix):
            dtype = torch.int8 if isinstance(matrix, Int8Matrix) else torch.float8_e4m3fn
            self._require("experts", f"{name}.scale", matrix.scale, (torch.float32,), (experts, rows))
        self._require("experts", f"{name}.values", matrix.values, (dtype,), (experts, rows, inner))
        return experts, rows, inner

    def combine(self, slots: Tensor, weights: Tensor, shared: Tensor, residual: Tensor) -> tuple[int, int, int]:
        """T, K and D."""
        tokens, top_k, size = self._shape("combine", "slots", slots, 3)
        self._require("combine", "slots", slots, (torch.float32,), (tokens, top_k, size))
        self._require("combine", "weights", weights, (torch.float32,), (tokens, top_k))
        self._require("combine", "shared", shared, self._float, (tokens, size))
        self._require("combine", "residual", residual, self._float, (tokens, size))
        return tokens, top_k, size

    def take_rows(self, table: Tensor, rows: Tensor) -> tuple[int, int, int]:
        """T, D and N."""
        length, size = self._shape("take_rows", "table", table, 2)
        self._require("take_rows", "table", table, (*self._float, torch.bfloat16), (length, size))
        count = self._shape("take_rows", "rows", rows, 1)[0]
        self._require("take_rows", "rows", rows, (torch.int64,), (count,))
        return count, size, length

    def _activations(self, op: str, x: Activations, wanted: ActivationFormat, tokens: int, hidden: int) -> None:
        if x.format is not wanted:
            raise ValueError(f"{op}: x.format is {x.format.value}, expected {wanted.value} for these weights")
        dtypes = {
            ActivationFormat.FLOAT: self._float,
            ActivationFormat.INT8: (torch.int8,),
            ActivationFormat.FP8: (torch.float8_e4m3fn,),
        }[wanted]
        self._require(op, "x.values", x.values, dtypes, (tokens, hidden))
        if wanted is ActivationFormat.FLOAT:
            if x.scale is not None:
                raise ValueError(f"{op}: x.scale is given, expected None for float activations")
        elif x.scale is None:
            raise ValueError(f"{op}: x.scale is None, expected float32 [{tokens}]")
        else:
            self._require(op, "x.scale", x.scale, (torch.float32,), (tokens,))

    def _shape(self, op: str, name: str, tensor: Tensor, rank: int) -> torch.Size:
        shape = tensor.shape
        if len(shape) != rank:
            raise ValueError(f"{op}: {name} is {_describe(tensor)}, expected {rank} dimensions")
        return shape

    def _require_columns(
        self, op: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
    ) -> None:
        """As `_require`, but for columns of a wider contiguous tensor too."""
        if not tensor.is_contiguous() and (tensor.stride(-1) != 1 or row_stride(tensor) < shape[-1]):
            raise ValueError(f"{op}: {name} {_describe(tensor)} is neither contiguous nor columns of what is")
        self._require(op, name, tensor, dtypes, shape, contiguous=False)

    def _require(
        self,
        op: str,
        name: str,
        tensor: Tensor,
        dtypes: tuple[torch.dtype, ...],
        shape: tuple[int, ...],
        contiguous: bool = True,
    ) -> None:
        if tensor.dtype not in dtypes or tensor.shape != shape:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{op}: {name} is {_describe(tensor)}, expected {kinds} {list(shape)}")
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} {_describe(tensor)} is not contiguous")
        if tensor.device.type != self._device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {self._device}")


def plain_experts(weights: LayerExperts) -> ExpertWeights:
    """Refuses with a ValueError what another backend prepared."""
    if not isinstance(weights, ExpertWeights):
        raise ValueError(f"experts: weights is {type(weights).__name__}, another backend's layout of ExpertWeights")
    return weights


def check_gate_config(config: GateConfig, experts: int) -> None:
    """Refuses a gate whose groups or top-k do not fit `experts`."""
    if config.n_group < 1 or experts % config.n_group:
        raise ValueError(f"gate: {experts} experts do not split into n_group = {config.n_group} equal groups")
    group_size = experts // config.n_group
    if config.n_group > 1 and group_size < 2:
        raise ValueError(f"gate: n_group = {config.n_group} leaves {group_size} expert a group; a group needs 2")
    if not 1 <= config.topk_group <= config.n_group:
        raise ValueError(f"gate: topk_group is {config.topk_group}, expected 1 to n_group = {config.n_group}")
    eligible = config.topk_group * group_size
    if not 1 <= config.top_k <= eligible:
        raise ValueError(f"gate: top_k is {config.top_k}, expected 1 to {eligible}, the experts of the chosen groups")


def check_paged_batch(batch: PagedBatch, num_pages: int, page_size: int, queries: int) -> None:
    """Refuses a batch whose numbers contradict each other or point outside `pages`. Copies to the host."""
    starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
    positions, table = batch.positions.tolist(), batch.page_table.tolist()
    if starts[0] != 0 or starts[-1] != queries:
        raise ValueError(f"mla_attention: batch.query_start runs from {starts[0]} to {starts[-1]}, not 0 to {queries}")
    for sequence, length in enumerate(lengths):
        begin, end = starts[sequence], starts[sequence + 1]
        if end < begin or end - begin > length:
            raise ValueError(
                f"mla_attention: sequence {sequence} has {end - begin} queries and batch.context_len {length}"
            )
        for query in range(begin, end):
            if positions[query] != length - (end - query):
                raise ValueError(
                    f"mla_attention: batch.positions[{query}] is {positions[query]}, expected "
                    f"{length - (end - query)} from context_len and query_start"
                )
        used = -(-length // page_size)
        if end > begin and (used > len(table[sequence]) or not all(0 <= p < num_pages for p in table[sequence][:used])):
            raise ValueError(
                f"mla_attention: batch.page_table[{sequence}] lacks some of the {used} pages of {length} tokens "
                f"(pages are 0 to {num_pages - 1})"
            )


def check_indices(op: str, name: str, indices: Tensor, limit: int) -> None:
    """Refuses indices outside 0 to limit - 1. Copies to the host."""
    for index, value in enumerate(indices.tolist()):
        if not 0 <= value < limit:
            raise ValueError(f"{op}: {name}[{index}] is {value}, expected 0 to {limit - 1}")


def row_stride(tensor: Tensor) -> int:
    """Values from one row [-1] of a tensor of two or three dimensions to the next; 0 if they are not evenly apart."""
    if tensor.is_contiguous():
        return tensor.shape[-1]
    *_, rows, _ = tensor.shape
    if tensor.dim() == 2 or rows == 1:
        return tensor.stride(0)
    apart = tensor.stride(1)
    return apart if tensor.shape[0] == 1 or tensor.stride(0) == rows * apart else 0


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


__all__ = [
    "ArgumentChecks",
    "ExpandedShapes",
    "LaidOutMatrix",
    "PairShapes",
    "check_gate_config",
    "check_indices",
    "check_paged_batch",
    "plain_experts",
    "row_stride",
]
