"""Runs every operation of a backend once on a small random input and compares it with the reference.

A shard does this before it says ready: a wrong build, driver or compiler is then an error with numbers in it, not
wrong text. Inner dimensions are the model's own; the others are cut so that the whole check stays well under a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import INT4_GROUP
from .composed import ComposedKernels
from .kv_entries import ROUNDED, entry_width
from .protocol import (
    ActivationFormat,
    Activations,
    AheadKernels,
    Bf16Matrix,
    Chunk,
    Drawn,
    ExpandingKernels,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    GateConfig,
    Int4Matrix,
    Int4Weight,
    Int8Matrix,
    Int8Weight,
    Kernels,
    PagedBatch,
    Sampled,
    SamplingRow,
    activation_format,
)
from .reference import ReferenceKernels
from .sampling import SamplingRows

_TOKENS = 5
_COLUMNS = 128  # libraries take no fewer
_LOGITS = 10000  # several programs share a row
_CHOSEN = 64  # of all experts: a wave keeps one a lane
_RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
# Where activations are split into two bfloat16 parts; the parts alone are within 2^-18 of a value.
_SPLIT_ERROR = 1e-4
# Where queries are rounded to bfloat16, and entries that are not in 8 bits.
_QUERY_ERROR = {torch.float32: 0.0, torch.bfloat16: 2e-2}
# Another order of sums may round one hidden value to the next FP8 number, which is 1/16 away.
_FP8_RELATIVE_ERROR = 3e-2
# Where the last bit of a float decides between one INT8 value and the next.
_CODE = 1 / 126
_TOLD_APART = 1e-4


@dataclass(frozen=True)
class CheckShapes:
    """The dimensions of one model that its kernels run with. experts: routed experts the gate chooses from;
    intermediate: of one routed expert."""

    hidden: int
    heads: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    experts: int
    intermediate: int
    page_size: int
    gate: GateConfig


@dataclass(frozen=True)
class CheckResult:
    """One comparison. Errors are the largest absolute difference; allowed 0 means equal to the bit."""

    operation: str
    max_error: float
    allowed: float


class KernelMismatch(RuntimeError):
    """A backend's result differs from the reference by more than is allowed."""


def self_check(
    kernels: Kernels, shapes: CheckShapes, matrices: Sequence[type[ExpertMatrix]], expanded: bool = False
) -> list[CheckResult]:
    """Compares all operations, `experts` for each kind in `matrices`, and `expanded_attention` where it will be used;
    raises `KernelMismatch` at the first failure."""
    check = _Check(kernels, shapes)
    for run in (check.rows, check.products, check.attention, check.gate, check.quantize, check.sample):
        run()
    for kind in matrices:
        check.experts(kind)
    check.mlp()
    if expanded:
        check.expanded_attention()
    return check.results


def random_matrix(
    kind: type[ExpertMatrix], experts: int, rows: int, inner: int, generator: torch.Generator
) -> ExpertMatrix:
    """A matrix of that kind, [experts, rows, inner], with values of about 1 / sqrt(inner)."""
    shape = (experts, rows, inner)
    size = inner**-0.5
    scale = (torch.rand(experts, rows, generator=generator) + 0.5) * size
    if issubclass(kind, Bf16Matrix):
        return Bf16Matrix((torch.randn(shape, generator=generator) * size).to(torch.bfloat16))
    if issubclass(kind, Fp8Matrix):
        return Fp8Matrix(torch.randn(shape, generator=generator).to(torch.float8_e4m3fn), scale)
    if issubclass(kind, Int8Matrix):
        values = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        return Int8Matrix(values, scale / 64)
    if inner % INT4_GROUP:
        raise ValueError(f"an INT4 matrix needs K in whole groups of {INT4_GROUP}, not {inner}")
    nibbles = torch.randint(0, 256, (experts, rows, inner // 2), generator=generator, dtype=torch.uint8)
    multipliers = torch.randint(1, 16, (experts, rows, inner // INT4_GROUP), generator=generator, dtype=torch.uint8)
    return Int4Matrix(nibbles, multipliers, scale / 48)


class _Check:
    """The inputs, drawn from one seeded generator, and the results so far."""

    def __init__(self, kernels: Kernels, shapes: CheckShapes) -> None:
        if kernels.activation_dtype not in _RELATIVE_ERROR:
            raise ValueError(f"no error bound is known for activations of {kernels.activation_dtype}")
        self.results: list[CheckResult] = []
        self._kernels, self._shapes = kernels, shapes
        rounded = kernels.kv_dtype if kernels.kv_dtype in ROUNDED else torch.float32
        self._reference = ReferenceKernels(kv_dtype=rounded)
        self._generator = torch.Generator().manual_seed(20_260)
        self._split = _SPLIT_ERROR if kernels.splits_floats else 0.0
        self._kv = max(self._split, _QUERY_ERROR[kernels.query_dtype])

    def rows(self) -> None:
        shapes = self._shapes
        x, weight = self._floats(_TOKENS, shapes.hidden), self._floats(shapes.hidden)
        self._both("rms_norm", lambda k, t: k.rms_norm(t(x), t(weight), 1e-5))
        self._both("rms_norm_quantize", lambda k, t: k.rms_norm_quantize(t(x), t(weight), 1e-5)[0])
        self._both(
            "rms_norm_quantize",
            lambda k, t: _floats(k.rms_norm_quantize(t(x), t(weight), 1e-5, floats=False)[1]),
            relative=_CODE,
        )
        gate_up = self._floats(_TOKENS, 2 * shapes.intermediate)
        self._both("silu_mul", lambda k, t: k.silu_mul(t(gate_up)))
        slots = torch.randn(_TOKENS, shapes.gate.top_k, shapes.hidden, generator=self._generator)
        weights = torch.rand(_TOKENS, shapes.gate.top_k, generator=self._generator)
        self._both("combine", lambda k, t: k.combine(t(slots, exact=True), t(weights, exact=True), t(x), t(x)))
        rows = torch.tensor([3, 0, 3])
        self._both("take_rows", lambda k, t: k.take_rows(t(x), t(rows)), exact=True)
        self._both("take_rows", lambda k, t: k.take_rows(t(x.bfloat16()), t(rows)))

        def replayed(k: Kernels, t: _Mover) -> Tensor:
            changing, given = t(x).clone(), (t(slots, exact=True), t(weights, exact=True))
            graph = k.capture(lambda: k.combine(*given, changing, k.combine(*given, changing, changing)))
            changing.copy_(t(x.flip(0)))
            graph.replay()
            return graph.result

        self._both("capture", replayed)

    def products(self) -> None:
        shapes = self._shapes
        x = self._floats(_TOKENS, shapes.hidden)
        for dtype in (torch.bfloat16, torch.float32):
            weight = self._floats(_COLUMNS, shapes.hidden).to(dtype)
            self._both("linear", lambda k, t, w=weight: k.linear(t(x), t(w, exact=True)), relative=self._split)
        rows, residual = self._reference.quantize(x, ActivationFormat.INT8), self._floats(_TOKENS, _COLUMNS)
        values = torch.randint(-127, 128, (_COLUMNS, shapes.hidden), generator=self._generator, dtype=torch.int8)
        scale = (torch.rand(_COLUMNS, generator=self._generator) + 0.5) / 64
        exact = self._kernels.activation_dtype is torch.float32
        self._both(
            "linear[Int8Weight]",
            lambda k, t: k.linear(t(x), Int8Weight(t(values), t(scale, exact=True))),
            exact,
        )
        self._both(
            "linear[Int8Weight]",
            lambda k, t: k.linear(t.activations(rows), Int8Weight(t(values), t(scale, exact=True)), t(residual)),
            exact,
        )
        if shapes.hidden % INT4_GROUP == 0:
            matrix = random_matrix(Int4Matrix, 1, _COLUMNS, shapes.hidden, self._generator)
            assert isinstance(matrix, Int4Matrix)
            nibbles, multipliers, scales = matrix.nibbles[0], matrix.multipliers[0], matrix.scale[0]
            self._both(
                "linear[Int4Weight]",
                lambda k, t: k.linear(t(x), Int4Weight(t(nibbles), t(multipliers), t(scales, exact=True)), t(residual)),
                exact,
            )
        queries = self._floats(_TOKENS, shapes.heads, shapes.qk_nope_head_dim)
        up_key = self._floats(shapes.heads, shapes.kv_lora_rank, shapes.qk_nope_head_dim)
        for dtype in (torch.bfloat16, torch.float32):
            up_weight = up_key.to(dtype)
            self._both(
                "head_linear",
                lambda k, t, w=up_weight: k.head_linear(t(queries), t(w, exact=True)),
                relative=self._split,
            )
        both = self._floats(_TOKENS, shapes.heads, shapes.qk_nope_head_dim + shapes.qk_rope_head_dim)
        positions = torch.arange(_TOKENS)
        table = torch.rand(64, shapes.qk_rope_head_dim // 2, generator=self._generator)
        self._both(
            "absorb",
            lambda k, t: k.absorb(t(both), t(up_key, exact=True), t(positions), *(t(table, exact=True),) * 2),
            relative=self._kv,
        )
        latents = self._floats(_TOKENS, shapes.heads, shapes.kv_lora_rank)
        up_value = self._floats(shapes.heads, shapes.v_head_dim, shapes.kv_lora_rank).to(torch.bfloat16)
        self._both("head_linear", lambda k, t: k.head_linear(t(latents), t(up_value, exact=True)), relative=self._split)

    def attention(self) -> None:
        """A prefill chunk of 4 after 67 tokens and one decoding query after 21, their pages in no order."""
        shapes = self._shapes
        width, context, new = shapes.kv_lora_rank + shapes.qk_rope_head_dim, (71, 22), (4, 1)
        used = [-(-length // shapes.page_size) for length in context]
        numbers = torch.randperm(sum(used), generator=self._generator).to(torch.int32)
        table = torch.full((2, max(used)), -1, dtype=torch.int32)
        table[0, : used[0]], table[1, : used[1]] = numbers[: used[0]], numbers[used[0] :]
        positions = torch.tensor([67, 68, 69, 70, 21])
        page = table[torch.tensor([0, 0, 0, 0, 1]), positions // shapes.page_size].to(torch.int64)
        slots = page * shapes.page_size + positions % shapes.page_size
        starts = torch.tensor([0, new[0], sum(new)], dtype=torch.int32)
        batch = PagedBatch(starts, torch.tensor(context, dtype=torch.int32), table, positions, slots)
        old, rows = self._floats(sum(used), shapes.page_size, width), self._floats(_TOKENS, width)
        norm, q = self._floats(shapes.kv_lora_rank), self._floats(_TOKENS, shapes.heads, width)
        angles = torch.rand(_TOKENS, shapes.qk_rope_head_dim // 2, generator=self._generator) * 6

        def write(k: Kernels, t: _Mover, pages: Tensor, into: Tensor, x: Tensor, norm: Tensor, eps: float) -> None:
            tables = t(torch.cos(angles), exact=True), t(torch.sin(angles), exact=True)
            k.write_kv(pages, t(into), t(x), t(norm), eps, t(torch.arange(len(x)) % _TOKENS), *tables)

        def touched(k: Kernels, t: _Mover) -> Tensor:
            """Beside this eps the mean of squares is nothing, so that the norm changes no bit."""
            pages = self._empty_pages(old, k)
            write(k, t, pages, slots, rows, torch.full_like(norm, 2.0**20), 2.0**40)
            if k.kv_dtype in ROUNDED:
                return pages.view(torch.uint8).float()
            return (pages.flatten(0, 1) != 0).any(dim=1).float()

        self._both("write_kv", touched, exact=True)

        def entries(k: Kernels, t: _Mover) -> Tensor:
            """Every entry, then those of this step over what stood there: the layout is the backend's own."""
            pages, before = self._empty_pages(old, k), old.flatten(0, 1)
            write(k, t, pages, torch.arange(len(before)), before, norm, 1e-6)
            write(k, t, pages, slots, rows, norm, 1e-6)
            return pages

        self._both(
            "mla_attention",
            lambda k, t: k.mla_attention(t(q), entries(k, t), t.batch(batch), width**-0.5, shapes.kv_lora_rank),
            relative=self._kv,
        )

    def expanded_attention(self) -> None:
        """A chunk that takes several programs, behind a prefix, beside a decoding query."""
        shapes, rows, past = self._shapes, 150, 91
        width, heads, inner = shapes.kv_lora_rank + shapes.qk_rope_head_dim, shapes.heads, shapes.qk_nope_head_dim
        used = -(-(past + rows) // shapes.page_size)
        table = torch.randperm(used, generator=self._generator).to(torch.int32).expand(2, -1).contiguous()
        positions = torch.cat([torch.tensor([past - 1]), torch.arange(past, past + rows)])
        starts, lengths = torch.tensor([0, 1, 1 + rows]), torch.tensor([past, past + rows])
        batch = PagedBatch(starts.to(torch.int32), lengths.to(torch.int32), table, positions, positions)
        entries = self._floats(used * shapes.page_size, width)
        q = self._floats(1 + rows, heads, inner + shapes.qk_rope_head_dim)
        up_key = (self._floats(heads, shapes.kv_lora_rank, inner) * shapes.kv_lora_rank**-0.5).bfloat16()
        up_value = (self._floats(heads, shapes.v_head_dim, shapes.kv_lora_rank) * shapes.kv_lora_rank**-0.5).bfloat16()
        angles = torch.rand(past + rows, shapes.qk_rope_head_dim // 2, generator=self._generator) * 6

        def attended(k: Kernels, t: _Mover) -> Tensor:
            assert isinstance(k, ExpandingKernels)
            pages = self._empty_pages(entries.view(used, shapes.page_size, width), k)
            tables = t(torch.cos(angles), exact=True), t(torch.sin(angles), exact=True)
            slots = t(torch.arange(len(entries)))
            k.write_kv(pages, slots, t(entries), t(torch.ones(shapes.kv_lora_rank)), 1e-6, slots % len(angles), *tables)
            out = t(torch.zeros(1 + rows, heads * shapes.v_head_dim))
            weights, scale = (t(up_key), t(up_value)), q.shape[2] ** -0.5
            chunk = Chunk(1, 1, rows, past + rows)
            k.expanded_attention(t(q), pages, t.batch(batch), chunk, *weights, *tables, scale, out)
            return out

        self._both("expanded_attention", attended, relative=self._kv)

    def _empty_pages(self, entries: Tensor, kernels: Kernels) -> Tensor:
        """Pages of zeros for so many entries [pages, page size, L + R]."""
        width = entry_width(kernels.kv_dtype, self._shapes.kv_lora_rank, self._shapes.qk_rope_head_dim)
        return torch.zeros(*entries.shape[:2], width, dtype=kernels.kv_dtype, device=kernels.device)

    def gate(self) -> None:
        shapes = self._shapes
        weight = self._floats(shapes.experts, shapes.hidden) * shapes.hidden**-0.5
        # Biases in even steps and little noise: choices are never within rounding of each other.
        bias = torch.randperm(shapes.experts, generator=self._generator).to(torch.float32) * _TOLD_APART * 10
        x = self._floats(_TOKENS, shapes.hidden) * _TOLD_APART
        self._both("gate[ids]", lambda k, t: k.gate(t(x), t(weight), t(bias, exact=True), shapes.gate)[0], exact=True)
        spread = self._floats(_TOKENS, shapes.hidden)
        everything = replace(shapes.gate, n_group=1, topk_group=1, top_k=min(shapes.experts, _CHOSEN))

        def weights_by_expert(k: Kernels, t: _Mover) -> Tensor:
            ids, weights = k.gate(t(spread), t(weight), t(bias, exact=True), everything)
            return weights.gather(1, ids.to(torch.int64).argsort(dim=1))

        self._both("gate", weights_by_expert)

    def quantize(self) -> None:
        x = self._floats(_TOKENS, self._shapes.hidden)
        x[0] = 0.0
        for format in (ActivationFormat.INT8, ActivationFormat.FP8):
            self._both("quantize", lambda k, t, f=format: k.quantize(t(x), f).values.to(torch.float32), exact=True)
            self._both("quantize", lambda k, t, f=format: _scale(k.quantize(t(x), f)), exact=True)

    def sample(self) -> None:
        logits = self._floats(3, _LOGITS)
        rows = [
            SamplingRow(0.0, 1.0, 0, 0, 0),
            SamplingRow(0.8, 0.9, 0, 7, 3, 0.01, 5),
            SamplingRow(1.2, 1.0, 40, 8, 4),
        ]
        if isinstance(self._kernels, AheadKernels):
            plain = [replace(row, top_logprobs=0) for row in rows]
            words = SamplingRows(plain).words

            def draw(k: Kernels, t: _Mover) -> Drawn | Sampled:
                return k.draw(t(logits), t(words)) if isinstance(k, AheadKernels) else k.sample(t(logits), plain)

            self._both("sample", lambda k, t: draw(k, t).tokens, exact=True)
            self._both("sample", lambda k, t: draw(k, t).logprobs)
        self._both("sample", lambda k, t: k.sample(t(logits), rows).tokens, exact=True)
        self._both("sample", lambda k, t: k.sample(t(logits), rows).logprobs)
        self._both("sample", lambda k, t: k.sample(t(logits), rows).top_tokens, exact=True)

    def experts(self, kind: type[ExpertMatrix]) -> None:
        """Twice: with the real hidden size and few intermediate columns, and the other way round."""
        exact = issubclass(kind, Int4Matrix | Int8Matrix)
        relative = _FP8_RELATIVE_ERROR if issubclass(kind, Fp8Matrix) else 0.0
        tokens = torch.tensor([0, 1, 2, 3, 4, 0], dtype=torch.int32)
        local = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.int32)
        for hidden, inner in ((self._shapes.hidden, _COLUMNS), (_COLUMNS, self._shapes.intermediate)):
            gate_up = random_matrix(kind, 2, 2 * inner, hidden, self._generator)
            down = random_matrix(kind, 2, hidden, inner, self._generator)
            weights = ExpertWeights(gate_up, down)
            x = self._reference.quantize(self._floats(_TOKENS, hidden), activation_format(down))
            self._both(
                f"experts[{kind.__name__}]",
                lambda k, t, x=x, w=weights: k.experts(t.activations(x), t(tokens), t(local), k.prepare(t.weights(w))),
                exact,
                relative,
            )

    def mlp(self) -> None:
        hidden, exact = self._shapes.hidden, self._kernels.activation_dtype is torch.float32
        gate_up = random_matrix(Int8Matrix, 1, 2 * _COLUMNS, hidden, self._generator)
        down = random_matrix(Int8Matrix, 1, hidden, _COLUMNS, self._generator)
        assert isinstance(gate_up, Int8Matrix)
        assert isinstance(down, Int8Matrix)
        x = self._reference.quantize(self._floats(_TOKENS, hidden), ActivationFormat.INT8)
        residual = self._floats(_TOKENS, hidden)

        def run(k: Kernels, t: _Mover) -> Tensor:
            first, second = (Int8Weight(t(each.values[0]), t(each.scale[0], exact=True)) for each in (gate_up, down))
            return k.mlp(t.activations(x), first, second, t(residual))

        self._both("mlp[Int8Weight]", run, exact)

    def _floats(self, *shape: int) -> Tensor:
        """Normal values that the backend's activation dtype holds exactly."""
        values = torch.randn(shape, generator=self._generator)
        return values.to(self._kernels.activation_dtype).to(torch.float32)

    def _both(
        self, operation: str, run: Callable[[Kernels, _Mover], Tensor], exact: bool = False, relative: float = 0.0
    ) -> None:
        """`relative` widens the dtype's own bound, both in parts of the largest expected magnitude; what a source
        promises widens either. operation: as in `Choice.label`, where the result is that operation's."""
        expected = run(self._reference, _Mover(self._reference))
        actual = run(self._kernels, _Mover(self._kernels)).to("cpu")
        name = f"{self._kernels.name}.{operation}"
        if actual.shape != expected.shape:
            raise KernelMismatch(f"{name}: shape {list(actual.shape)}, the reference has {list(expected.shape)}")
        wanted = expected.to(torch.float64)
        error = float((actual.to(torch.float64) - wanted).abs().max())
        relative = 0.0 if exact else max(relative, _RELATIVE_ERROR[self._kernels.activation_dtype])
        if isinstance(self._kernels, ComposedKernels):
            relative = max(relative, self._kernels.relative_error(operation))
        allowed = relative * float(wanted.abs().max())
        if not error <= allowed:  # NaN is an error too
            raise KernelMismatch(f"{name}: largest error {error:.3g} against the reference, allowed {allowed:.3g}")
        self.results.append(CheckResult(operation, error, allowed))


class _Mover:
    """Brings inputs to a backend's device, and float32 ones to its activation dtype unless they are `exact`."""

    def __init__(self, kernels: Kernels) -> None:
        self._device, self._dtype = kernels.device, kernels.activation_dtype

    def __call__(self, tensor: Tensor, exact: bool = False) -> Tensor:
        if tensor.dtype is torch.float32 and not exact:
            return tensor.to(self._device, self._dtype)
        return tensor.to(self._device)

    def activations(self, x: Activations) -> Activations:
        return Activations(x.format, self(x.values), None if x.scale is None else self(x.scale, exact=True))

    def batch(self, batch: PagedBatch) -> PagedBatch:
        return batch.moved(self)

    def weights(self, weights: ExpertWeights) -> ExpertWeights:
        return replace(weights, gate_up=self._matrix(weights.gate_up), down=self._matrix(weights.down))

    def _matrix(self, matrix: ExpertMatrix) -> ExpertMatrix:
        return type(matrix)(**{name: self(tensor, exact=True) for name, tensor in vars(matrix).items()})


def _floats(x: Activations) -> Tensor:
    """What INT8 rows stand for."""
    return x.values.to(torch.float32) * _scale(x)[:, None]


def _scale(x: Activations) -> Tensor:
    assert x.scale is not None
    return x.scale
