"""Attention with expanded keys and values: the reference against torch's own in float64 and against absorbed attention,
and Triton's kernels, interpreted on the CPU and on a GPU where there is one, against the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import cached, gathered, kept, normal, paged
from moved_kernels import moved, triton_kernels
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flyray.kernels.protocol import Chunk, ExpandingKernels, Kernels
from flyray.kernels.reference import ReferenceKernels, rotate
from flyray.kernels.select import CPU_BACKENDS, EXPANDING, select_kernels

HERE = Path(__file__).parent
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)


class Case:
    """Sequences in pages, unabsorbed queries, and the chunk of one sequence."""

    def __init__(self, queries: list[int], contexts: list[int], which: int, sizes: tuple[int, ...], seed: int) -> None:
        self.heads, self.rank, self.rope, self.inner, self.value = sizes
        self.batch, total = paged(queries, contexts, 8, 2, seed)
        self.chunk = Chunk(which, int(self.batch.query_start[which]), queries[which], contexts[which])
        self.entries = normal(seed, total, 8, self.rank + self.rope)
        self.q = normal(seed + 1, sum(queries), self.heads, self.inner + self.rope)
        self.up_key = normal(seed + 2, self.heads, self.rank, self.inner) * self.rank**-0.5
        self.up_value = normal(seed + 3, self.heads, self.value, self.rank) * self.rank**-0.5
        angles = torch.rand(max(contexts), self.rope // 2, generator=torch.Generator().manual_seed(seed)) * 6
        self.cos, self.sin = angles.cos(), angles.sin()

    @property
    def rows(self) -> slice:
        return slice(self.chunk.first, self.chunk.first + self.chunk.rows)

    def expanded(self, kernels: ExpandingKernels, pages: Tensor) -> Tensor:
        """The chunk's rows; that no other one is written."""
        out = torch.full((len(self.q), self.heads * self.value), 7.0)
        given = self.q, pages, self.batch, self.chunk, self.up_key, self.up_value, self.cos, self.sin, 0.2, out
        there = moved(given, kernels.device)
        kernels.expanded_attention(*there)
        out = there[-1].cpu()
        found = out[self.rows].clone()
        out[self.rows] = 7.0
        assert bool((out == 7.0).all())
        return found

    def absorbed(self, kernels: Kernels, pages: Tensor) -> Tensor:
        q = kernels.absorb(self.q, self.up_key, self.batch.positions, self.cos, self.sin)
        latent = kernels.mla_attention(q, pages, self.batch, 0.2, self.rank)
        return kernels.head_linear(latent, self.up_value).flatten(1)[self.rows]

    def oracle(self, kernels: Kernels) -> Tensor:
        """PyTorch's attention in float64."""
        entries = gathered(kept(kernels, self.entries, self.rank), self.batch, self.chunk.sequence).double()
        latent, rotated = entries[:, : self.rank], entries[None, :, self.rank :].expand(self.heads, -1, -1)
        keys = torch.cat([latent @ self.up_key.double(), rotated], dim=2)
        values = latent @ self.up_value.double().mT
        q = self.q[self.rows].double()
        turned = rotate(q[..., self.inner :], self.batch.positions[self.rows], self.cos.double(), self.sin.double())
        q = torch.cat([q[..., : self.inner], turned], dim=2).transpose(0, 1)
        seen = torch.ones(self.chunk.rows, self.chunk.context).tril(self.chunk.context - self.chunk.rows).bool()
        return scaled_dot_product_attention(q, keys, values, seen, scale=0.2).transpose(0, 1).flatten(1)


SIZES = st.tuples(
    st.integers(1, 4), st.integers(1, 40), st.sampled_from([2, 6, 8]), st.integers(1, 24), st.integers(1, 20)
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=3),
    SIZES,
    st.sampled_from((torch.float32, torch.int8, torch.float8_e4m3fn)),
    st.integers(0, 99),
)
def test_the_reference_is_torchs_attention_and_its_own_absorbed_one(
    lengths: list[tuple[int, int]], sizes: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    reference = ReferenceKernels(kv_dtype=dtype)
    queries, contexts = [new for new, _ in lengths], [new + past for new, past in lengths]
    case = Case(queries, contexts, seed % len(lengths), sizes, seed)
    pages = cached(reference, case.entries, case.rank)
    found, expected = case.expanded(reference, pages), case.oracle(reference)
    # 2^-24 a rounding, of sums of up to 40 products and shares of up to 100 entries.
    bound = 2e-5 * float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) <= bound
    assert float((found - case.absorbed(reference, pages)).abs().max()) <= 2 * bound


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("sizes", [(4, 128, 32, 64, 64), (3, 38, 8, 24, 20)])
def test_triton_on_a_gpu(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """Queries, entries, keys, values and shares are rounded to bfloat16, 2^-9 of each."""
    gpu = triton_kernels(dtype)
    reference = ReferenceKernels(kv_dtype=torch.float32 if dtype is torch.bfloat16 else dtype)
    for queries, contexts, which in (([1, 300, 3], [9, 431, 20], 1), ([200], [200], 0)):
        case = Case(queries, contexts, which, sizes, 3)
        expected = case.expanded(reference, cached(reference, case.entries, case.rank))
        found = case.expanded(gpu.inner, cached(gpu, case.entries, case.rank))  # type: ignore[attr-defined]
        assert float((found - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


def test_who_has_it() -> None:
    for backend in CPU_BACKENDS:
        assert isinstance(select_kernels(backend, 1), ExpandingKernels) == (backend in EXPANDING)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"first": 1}, r"is not within 1 sequences of 5 rows"),
        ({"sequence": 1}, r"is not within 1 sequences of 5 rows"),
        ({"context": 99}, r"does not fit its 3 pages of 8 tokens"),
        ({"rows": 0}, r"does not fit its 3 pages"),
    ],
)
def test_a_chunk_outside_its_batch_is_refused(change: dict[str, int], named: str) -> None:
    reference = ReferenceKernels()
    case = Case([5], [12], 0, (2, 6, 2, 4, 3), 0)
    case.chunk = replace(case.chunk, **change)
    with pytest.raises(ValueError, match=f"expanded_attention: .*{named}"):
        case.expanded(reference, cached(reference, case.entries, 6))


def test_pages_of_float32_are_refused_by_triton() -> None:
    pytest.importorskip("triton.backends")
    from flyray.kernels.triton.backend import TritonKernels

    case = Case([5], [12], 0, (2, 6, 2, 4, 3), 0)
    with pytest.raises(ValueError, match="expanded_attention: pages is float32"):
        case.expanded(TritonKernels(torch.device("meta"), torch.float32), torch.zeros(3, 8, 8))


# Chunks with and without a prefix, tiles that rows and keys do not fill, slices that no block of keys fills, programs
# that share keys; values that are computed in float32, which the interpreter multiplies rightly.
PROGRAM = """
import torch
from kernel_cases import cached
from test_expanded_attention import Case
from flyray.kernels.checks import ExpandedShapes
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.triton.attention_expanded import ExpandedTile, expanded_attention

TILES = ExpandedTile(16, 16, 4, 1), ExpandedTile(16, 32, 4, 1, 32, 1), ExpandedTile(32, 16, 4, 1, 17, 1 << 11)
ODD, EVEN = (2, 38, 8, 24, 20), (1, 64, 16, 32, 16)
FLOATS = (0, TILES[:1]), (1, TILES), (2, TILES[1:2])
CASES = (ODD, torch.float32, FLOATS), (ODD, torch.int8, ((1, TILES[1:2]),)), (EVEN, torch.float8_e4m3fn, FLOATS[:1])
for sizes, dtype, chunks in CASES:
    reference = ReferenceKernels(kv_dtype=dtype)
    for which, tiles in chunks:
        case = Case([3, 40, 21], [45, 70, 21], which, sizes, 5)
        heads, rank, rope, inner, value = sizes
        pages = cached(reference, case.entries, rank)
        expected = case.expanded(reference, pages)
        for tile in tiles:
            out = torch.zeros(64, heads * value)
            shapes = ExpandedShapes(heads, rank, inner, rope, value)
            given = case.up_key, case.up_value, case.cos, case.sin, 0.2, out
            expanded_attention(case.q, pages, case.batch, case.chunk, *given, shapes, tile, torch.float32)
            error = float((out[case.rows] - expected).abs().max())
            assert error <= 5e-6, (sizes, dtype, which, tile, error)
# An angle that there is not, and an entry without a page, show in the rows that need them.
case, out = Case([3, 40, 21], [45, 70, 21], 2, EVEN, 5), torch.zeros(64, heads * value)
given = case.up_key, case.up_value, case.cos[:19].contiguous(), case.sin[:19].contiguous(), 0.2, out
expanded_attention(case.q, pages, case.batch, case.chunk, *given, shapes, TILES[0], torch.float32)
assert out[case.rows].isnan().all(dim=1).tolist() == [False] * 19 + [True] * 2
case.batch.page_table[2, 1] = -1
given = case.up_key, case.up_value, case.cos, case.sin, 0.2, out
expanded_attention(case.q, pages, case.batch, case.chunk, *given, shapes, TILES[0], torch.float32)
assert out[case.rows][8:].isnan().all()
"""


def test_triton_in_the_interpreter() -> None:
    """In a process of its own, for the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton.backends")
    paths = os.pathsep.join(map(str, (HERE, HERE.parent / "support")))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
