"""What the model needs from a kernel backend: tensors in, tensors out.

Shapes use T tokens, D hidden size, H heads, E experts, K top-k slots, P (token, expert) pairs, V vocabulary,
L `kv_lora_rank`, R `qk_rope_head_dim`. "float" is the backend's activation dtype: float32 on CPU.

**Batch invariance.** In every backend a row of the result depends only on that row's own inputs, never on which
other rows stand beside it, on their number, or on how a prompt was cut into chunks. Sums therefore run in one
fixed order. Greedy text is then the same for any batch and any number of shards, and a replay after a failure
continues bit for bit. INT8 sums are exact integers, so there backends also agree with each other to the bit.
One optional operation, `ExpandingKernels.expanded_attention`, does not promise this; who calls it gives that up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor


class ActivationFormat(Enum):
    """How the activations of routed experts are represented when they travel and are multiplied."""

    FLOAT = "float"
    INT8 = "int8"
    FP8 = "fp8"


@dataclass(frozen=True)
class Activations:
    """Rows of activations, quantized per row unless `format` is FLOAT.

    values: [T, D] float, int8 or float8_e4m3fn; scale: [T] float32, or None for FLOAT; row = values * scale.
    """

    format: ActivationFormat
    values: Tensor
    scale: Tensor | None


@dataclass(frozen=True)
class Int4Matrix:
    """`w4a8`: INT4 in groups of 32 along K with an integer multiplier a group and one scale a row.

    Row value = nibble_value * multiplier * scale, nibble_value in [-8, 7], multiplier in 1..15,
    |nibble_value * multiplier| <= 127.

    nibbles: [E, N, K/2] uint8, offset binary (value + 8). Byte j (0..15) of a group's 16 bytes holds k = j in its low
        and k = j + 16 in its high nibble, so that both halves unpack without a shuffle.
    multipliers: [E, N, K/32] uint8. scale: [E, N] float32.
    """

    nibbles: Tensor
    multipliers: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Int8Matrix:
    """`w8a8` and `w4a8-channel`: values [E, N, K] int8, scale [E, N] float32; weight = values * scale."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Fp8Matrix:
    """`w8a8-fp8`: values [E, N, K] float8_e4m3fn, scale [E, N] float32; weight = values * scale."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Bf16Matrix:
    """`bf16` and dequantized `w4a16`: values [E, N, K] bfloat16."""

    values: Tensor


ExpertMatrix = Int4Matrix | Int8Matrix | Fp8Matrix | Bf16Matrix


@dataclass(frozen=True)
class Int8Weight:
    """The weight of one linear in 8 bits: values [N, K] int8, scale [N] float32; weight = values * scale.

    Its activations are quantized per row to INT8, as `Kernels.quantize` does, and summed as integers.
    """

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Int4Weight:
    """The weight of one linear in 4 bits, laid out and valued as one expert of an `Int4Matrix`.

    nibbles [N, K/2] uint8, multipliers [N, K/32] uint8, scale [N] float32. Activations as of an `Int8Weight`.
    """

    nibbles: Tensor
    multipliers: Tensor
    scale: Tensor


IntegerWeight = Int8Weight | Int4Weight
LinearWeight = Tensor | IntegerWeight


class PreparedMatrix(Protocol):
    """An expert matrix in a backend's own layout."""

    @property
    def kind(self) -> type[ExpertMatrix]:
        """What it was made of."""
        ...


def matrix_kind(matrix: ExpertMatrix | PreparedMatrix) -> type[ExpertMatrix]:
    """Of which kind a matrix is, in whatever layout."""
    return type(matrix) if isinstance(matrix, ExpertMatrix) else matrix.kind


def activation_format(matrix: ExpertMatrix | PreparedMatrix) -> ActivationFormat:
    """The activation format that a matrix multiplies."""
    kind = matrix_kind(matrix)
    if kind in (Int4Matrix, Int8Matrix):
        return ActivationFormat.INT8
    return ActivationFormat.FP8 if kind is Fp8Matrix else ActivationFormat.FLOAT


@dataclass(frozen=True)
class ExpertWeights:
    """Routed experts of one layer, by numbers of their own, 0..E-1.

    gate_up: N = 2 * I rows, the gate's I rows first; K = D. down: N = D rows, K = I. Both of one kind.
    """

    gate_up: ExpertMatrix
    down: ExpertMatrix


class PreparedExperts(Protocol):
    """`ExpertWeights` in the layout that a backend's `prepare` made; no other backend runs them."""

    @property
    def gate_up(self) -> PreparedMatrix: ...

    @property
    def down(self) -> PreparedMatrix: ...


LayerExperts = ExpertWeights | PreparedExperts


@dataclass(frozen=True)
class GateConfig:
    """DeepSeek-V3's `noaux_tc` gate: which experts a token visits, and with what weight."""

    top_k: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float


@dataclass(frozen=True)
class Chunk:
    """Several queries of one sequence in a step, as the host knows them.

    sequence: which of the batch. first, rows: its queries are first..first + rows. context: tokens of the sequence in
    the cache, these included; the last query sees all of them.
    """

    sequence: int
    first: int
    rows: int
    context: int


@dataclass(frozen=True)
class PagedBatch:
    """Where the queries of one step stand in the paged latent KV cache. S sequences, T = query_start[S] queries.

    query_start: [S + 1] int32; sequence s has queries query_start[s]..query_start[s + 1].
    context_len: [S] int32, tokens in the cache including this step's; the last query sees all of them.
    page_table: [S, max_pages] int32, page numbers, unused entries -1.
    positions: [T] int64, each query's position. slots: [T] int64, page * page_size + offset of each query's own entry.
    chunks: of the sequences with more than one query, in order; none where the host does not know them, as in steps
    that are captured.
    """

    query_start: Tensor
    context_len: Tensor
    page_table: Tensor
    positions: Tensor
    slots: Tensor
    chunks: tuple[Chunk, ...] = ()

    def moved(self, move: Callable[[Tensor], Tensor]) -> PagedBatch:
        """The same with every tensor given to `move`, such as a copy to a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: move(tensor) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class LogitChanges:
    """What changes one row of logits before a token is drawn; its log probability stays that of the logits as given.

    bias_tokens: [b] int64, each once, bias: [b] float64, added. seen: [n] int64, the distinct tokens of prompt and
    answer so far; counts: [n] float64, how often each is in the answer. banned: [m] int64, cannot be drawn. allowed:
    [W] int32, 32 W at least V: token t can be drawn where bit t % 32 of word t // 32 is 1; None: any.
    All on the logits' device. repetition_penalty is above 0.
    """

    bias_tokens: Tensor
    bias: Tensor
    seen: Tensor
    counts: Tensor
    banned: Tensor
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    allowed: Tensor | None = None


@dataclass(frozen=True)
class SamplingRow:
    """How one row of logits becomes a token. temperature 0 is greedy; top_k 0, top_p 1.0 and min_p 0.0 are off.

    The random number is a function of (seed, position) alone, so a replay draws the same token. top_logprobs: how many
    of the most probable tokens are told, 0 to `sampling_limits.MAX_TOP_LOGPROBS`.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    position: int
    min_p: float = 0.0
    top_logprobs: int = 0
    changes: LogitChanges | None = None


@dataclass(frozen=True)
class Sampled:
    """The tokens of S rows of logits. Log probabilities are those of the logits as given, at temperature 1.

    tokens: [S] int64. logprobs: [S] float32. top_tokens: [S, N] int64 and top_logprobs: [S, N] float32, the most
    probable tokens of each row, best first, ties to the lower id; N is the most that any row asks for, at most V.
    """

    tokens: Tensor
    logprobs: Tensor
    top_tokens: Tensor
    top_logprobs: Tensor


@dataclass(frozen=True)
class Drawn:
    """The tokens of S rows of logits as `Sampled` has them, and what says whether they are any.

    tokens: [S] int64. logprobs: [S] float32. largest: [S] float32, each row's largest logit: what stands beside one
    that is no finite number means nothing.
    """

    tokens: Tensor
    logprobs: Tensor
    largest: Tensor


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Graph(Protocol[T_co]):
    """Operations that were recorded while they ran once, to be run again with less work a call.

    result: what the recorded function returned; its tensors have the contents of the last run. Graphs that share
    memory (`Kernels.capture`) must not run at the same time.
    """

    @property
    def result(self) -> T_co: ...

    def replay(self) -> None:
        """Runs the operations again, on the same tensors. Arguments are not checked but for indices."""
        ...


class Kernels(Protocol):
    """One backend. Every method refuses a dtype or shape it cannot run with a ValueError that names it."""

    name: str
    device: torch.device
    activation_dtype: torch.dtype
    kv_dtype: torch.dtype
    """Of KV pages: float32, bfloat16, or int8 and float8_e4m3fn, whose entries stand as `kv_entries` says and are those
    of the reference to the bit."""
    query_dtype: torch.dtype
    """Of absorbed queries. bfloat16 where they, the shares of attention and floats in pages are rounded to it: a
    query's result may then stand off the reference's by 1e-2 of the largest entry."""
    splits_floats: bool
    """Whether `linear` and `head_linear` with bfloat16 weights, and `mla_attention`, split float32 into two bfloat16
    parts, the last for queries of float32. Their results may then stand off the reference's by 1e-4 of the row's
    largest."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, D] float, columns of a wider matrix too, weight [D] bf16 or float -> [T, D] float; mean of squares in
        float32."""
        ...

    def rms_norm_quantize(
        self, x: Tensor, weight: Tensor, eps: float, floats: bool = True
    ) -> tuple[Tensor, Activations]:
        """`rms_norm`, and `quantize` of its result to INT8. floats: whether the first is wanted; else it is [0, D]."""
        ...

    def linear(self, x: Tensor | Activations, weight: LinearWeight, residual: Tensor | None = None) -> Tensor:
        """x [T, K] float, weight [N, K] bf16, float32, Int8Weight or Int4Weight -> x @ weight.T, [T, N] float;
        residual [T, N] float: residual + the product, rounded to float before.

        Summed in float32; with an Int8Weight or Int4Weight x is quantized to INT8 per row first, or comes as such rows,
        the sum is an exact integer, and the result is float32(sum) * (x's row scale * the weight's row scale)."""
        ...

    def head_linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """A linear a head. x [T, H, A] float, weight [H, B, A] bf16 or float32 -> [T, H, B] float."""
        ...

    def mlp(
        self, x: Activations, gate_up: IntegerWeight, down: IntegerWeight, residual: Tensor | None = None
    ) -> Tensor:
        """A gated MLP as the only expert of `experts`, which all rows visit: x [T, D] INT8, gate_up [2 * I, D] with the
        gate's rows first, down [D, I], both of one kind -> [T, D] float32; residual as of `linear`."""
        ...

    def absorb(self, q: Tensor, weight: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries for `mla_attention`: q [T, H, A + R] float, columns of a wider tensor too, weight [H, L, A] bf16 or
        float32, positions [T], cos and sin [max_position, R/2] float32 -> [T, H, L + R] of `query_dtype`, `head_linear`
        of each head's first A values, and its last R, whose pairs (2i, 2i + 1) are rotated and stay in their places."""
        ...

    def write_kv(
        self,
        pages: Tensor,
        slots: Tensor,
        rows: Tensor,
        norm: Tensor,
        eps: float,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """Stores entries at slots [T] of pages [num_pages, page_size, W] of `kv_dtype`, W = `kv_entries.entry_width`.
        An entry is made of a row [L + R] of rows [T, L + R] float, columns of a wider matrix too: its latent is
        `rms_norm` of the first L with norm [L] bf16 or float, its key the last R, rotated as in `absorb`.

        In 8 bits an entry's bytes are those of `kv_entries`. How one of floats stands in its W = L + R words is the
        backend's own: `mla_attention` of the same backend reads it."""
        ...

    def mla_attention(self, q: Tensor, pages: Tensor, batch: PagedBatch, scale: float, kv_lora_rank: int) -> Tensor:
        """Causal attention with absorbed projections over latent pages, prefill and decode alike.

        q [T, H, L + R] float or `query_dtype` (already multiplied by the key up-projection), pages as `write_kv` takes
        them -> [T, H, L] float: softmax(scale * q . kv) over the visible entries, times their first L values.
        An entry in 8 bits scores entry_scale * (q . codes) + q . key, and its share times entry_scale times its codes
        is what it adds.
        """
        ...

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor, config: GateConfig) -> tuple[Tensor, Tensor]:
        """x [T, D] float, weight [E, D], bias [E] float32 -> expert ids [T, K] int32 (best first, ties to the lower
        id) and weights [T, K] float32. Scores are sigmoid(x @ weight.T) in float32; the bias only chooses."""
        ...

    def quantize(self, x: Tensor, format: ActivationFormat) -> Activations:
        """x [T, D] float -> per-row dynamic quantization. INT8: scale = absmax / 127, half to even, a zero row has
        scale 0. FP8: scale = absmax / 448. FLOAT: x itself."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 * I] float -> silu(gate) * up, [T, I] float, with `exp` from IEEE operations only."""
        ...

    def prepare(self, weights: ExpertWeights) -> LayerExperts:
        """The weights in the layout that `experts` multiplies, made once, when they are loaded; they themselves where
        the backend has no other. They are on the backend's device."""
        ...

    def experts(self, x: Activations, pair_token: Tensor, pair_expert: Tensor, weights: LayerExperts) -> Tensor:
        """Runs (token, expert) pairs: gate and up, SiLU, quantize again per pair, down; not yet weighted.

        pair_token [P] int32 rows of x, pair_expert [P] int32 local expert numbers -> [P, D] float32. weights: what
        `prepare` gave, or plain ones, which a backend with a layout of its own lays out anew each time.
        """
        ...

    def combine(self, slots: Tensor, weights: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
        """residual + (sum + shared): slots [T, K, D] float32, weights [T, K] float32, summed over K in slot order;
        shared and residual [T, D] float -> [T, D] float."""
        ...

    def sample(self, logits: Tensor, rows: list[SamplingRow]) -> Sampled:
        """logits [S, V] float, a row of `rows` each -> tokens and log probabilities, as `kernels/sampling.py` defines
        them to the bit; greedy ties go to the lower id. Captured it takes `sampling.SamplingRows`, of which none has
        changes or top_logprobs."""
        ...

    def take_rows(self, table: Tensor, rows: Tensor) -> Tensor:
        """Rows [T] int64 of table [N, D] bf16 or float -> [T, D] float."""
        ...

    def capture(self, run: Callable[[], T], beside: Graph[object] | None = None) -> Graph[T]:
        """Runs `run` once, in this thread, with the operations of this backend that it calls, and records these.

        What `run` computes otherwise (with torch, or from the contents of tensors) is not run again, so it may only
        make constants and views. The graph keeps every tensor that the operations read or write. beside: a graph
        whose memory this one shares: both may not run at the same time, and what one leaves in tensors that nobody
        holds any more the other overwrites.
        """
        ...


@runtime_checkable
class JoiningKernels(Kernels, Protocol):
    """A backend to which many operations are handed at once: what calls them one by one is cold code after each."""

    def joined(self, run: Callable[[], T]) -> T:
        """Calls `run`, then runs the operations that it called, in their order; until then their results have
        undefined contents. As for `capture`, what `run` computes otherwise may only be constants and views."""
        ...


@runtime_checkable
class AheadKernels(Kernels, Protocol):
    """A backend whose operations return before they are done, so that a step can be begun while the last one runs.

    Its graphs record what torch computes on its device too. leaves_out: whether `write_kv` leaves out slots below 0
    and `experts` experts below 0, whose rows of the result are then undefined.
    """

    leaves_out: bool

    def draw(self, logits: Tensor, words: Tensor) -> Drawn:
        """`sample` of rows without changes and top_logprobs that waits for nothing and refuses no value.

        logits [S, V] float; words [S, `sampling.WORDS`] float64, how each row draws. Tokens to the bit, also of a
        captured call with other words; log probabilities but for the device's own logarithm."""
        ...

    def branch(self, rows: int, run: Callable[[], T]) -> T:
        """Calls `run`, whose operations on `rows` rows may from then on run beside those called after them. Until
        `join` nobody may read or write what they write, nor write what they read; a capture joins at its end."""
        ...

    def join(self) -> None:
        """What is called from now on runs after all branches."""
        ...


@runtime_checkable
class ExpandingKernels(Kernels, Protocol):
    """A backend that can also attend with a key and a value for each head, made of latents: fewer operations a pair of
    query and entry than `mla_attention` takes, for the price of making them anew for each call."""

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
        scale: float,
        out: Tensor,
    ) -> None:
        """Causal attention of one chunk of the batch, from unabsorbed queries to what the output projection takes:
        what `absorb`, `mla_attention` and `head_linear` give together, but for rounding.

        q [T, H, A + R] float, of which the last R of a head are not yet rotated; up_key [H, L, A], up_value [H, V, L]
        bf16 or float32; pages, cos and sin as `write_kv` and `absorb` take them; out [T, H * V] float, whose rows of
        the chunk are written: softmax(scale * (q[:A] . (up_key . latent) + rotated q[A:] . key)) times (up_value .
        latent) over the visible entries. Where `query_dtype` is bfloat16, queries, latents, keys, values and shares are
        rounded to it.

        **Alone of all operations it is not batch invariant**: a row's bits may depend on the chunk that it is in."""
        ...
