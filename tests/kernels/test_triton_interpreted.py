"""Integer products, transfers between GPUs, AITER's lists of keys and draws in Triton's interpreter, on the CPU, to the
bit; run in a process of its own, for the interpreter is chosen when Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends")

HERE = Path(__file__).parent

PROGRAM = """
import torch
from kernel_cases import expert_weights, int4_weight, int8_weight, normal, pairs
from flyray.kernels.checks import PairShapes
from flyray.kernels.protocol import ActivationFormat, GateConfig, Int4Matrix, Int8Matrix
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.triton.gate import choose
from flyray.kernels.triton.experts import run_experts
from flyray.kernels.triton.layouts import tile_experts
from flyray.kernels.triton.linear import gated_hidden, integer_linear
from flyray.kernels.triton.linear_tiles import LINEAR_NAMES, Arrivals, LinearTable, LinearTile
from flyray.kernels.triton.linear_tiles import LinearTuning
from flyray.kernels.triton.rows import combine
from flyray.kernels.triton.tiles import Regime, TileTable

reference = ReferenceKernels()
for kind in (Int4Matrix, Int8Matrix):
    weights, (token, expert) = expert_weights(kind, 3, 288, 96), pairs(4, 3, 12)
    x = reference.quantize(normal(1, 4, 288), ActivationFormat.INT8)
    shapes = PairShapes(4, 12, 3, 288, 96)
    actual = run_experts(x, token, expert, tile_experts(weights), shapes, TileTable.of("default"))
    assert torch.equal(actual, reference.experts(x, token, expert, weights)), kind
def tuned(tile, amd=False):
    table = {(kind, 1, 1): (Regime(1, tile),) for kind in LINEAR_NAMES}
    return LinearTuning(LinearTable(table), Arrivals(torch.device("cpu")), amd)


# Whole and in parts, of which the last is shorter, for CUDA and for AMD; beyond the last row, token and column of K;
# twice, so that counters must be zero again; unpacked in memory; stored in pieces.
ONE, SPLIT, AMD = LinearTile(64, 16, 256, 1, 4, 3), LinearTile(32, 16, 64, 2, 2, 2), LinearTile(64, 64, 128, 2, 1, 2, 1)
for tokens, tile, amd in ((3, ONE, False), (3, SPLIT, False), (70, AMD, True)):
    x, residual, tuning = normal(2, tokens, 160), normal(8, tokens, 70), tuned(tile, amd)
    rows = reference.quantize(x, ActivationFormat.INT8)
    for weight in (int8_weight(70, 160), int4_weight(70, 160)):
        expected = reference.linear(x, weight)
        assert torch.equal(integer_linear(rows, weight, tuning), expected), (type(weight), tile)
        assert torch.equal(integer_linear(rows, weight, tuning, residual=residual), residual + expected), tile
for make in (int8_weight, int4_weight):
    rows, gate_up, down = reference.quantize(normal(3, 3, 160), ActivationFormat.INT8), make(128, 160), make(160, 64)
    actual = integer_linear(gated_hidden(rows, gate_up, tuned(SPLIT)), down, tuned(ONE), True)
    assert torch.equal(actual, reference.mlp(rows, gate_up, down)), make
inputs = normal(4, 3, 5, 70), normal(5, 3, 5), normal(6, 3, 70), normal(7, 3, 70)
assert torch.allclose(combine(*inputs), reference.combine(*inputs), rtol=0, atol=1e-5)
"""

# Two "GPUs" of one process write into each other's memory.
PEERS = """
import torch
from flyray.kernels.protocol import ActivationFormat, Activations
from flyray.kernels.triton.peers import meet, push_outputs, push_rows

SHARDS, TOKENS, SLOTS, COLUMNS = 2, 3, 3, 40
HELD = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 3], dtype=torch.int32)
ids = torch.tensor([[[0, 5, 3], [5, 4, 1], [1, 2, 0]], [[4, 0, 2], [3, 1, 5], [2, 0, 4]]], dtype=torch.int32)
# Expert 0 has two slots, 0 and 6, to which rows go in turns.
table = torch.tensor([[0, 6], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5]], dtype=torch.int32)
slot_of = table[ids.long(), (torch.arange(TOKENS) % 2)[None, :, None]]
counts = torch.zeros(6, dtype=torch.int32)
values = torch.randint(-127, 128, (SHARDS, TOKENS, COLUMNS), dtype=torch.int8)
scale = torch.rand(SHARDS, TOKENS)

def buffers(dtype, *shape):
    made = [torch.full(shape, 77, dtype=dtype) for _ in range(SHARDS)]
    return made, torch.tensor([each.data_ptr() for each in made])

for scaled in (True, False):
    rows, row_places = buffers(torch.int8, SHARDS * TOKENS, COLUMNS)
    scales, scale_places = buffers(torch.float32, SHARDS * TOKENS)
    experts, expert_places = buffers(torch.int32, SHARDS * TOKENS, SLOTS)
    for shard in range(SHARDS):
        kind = ActivationFormat.INT8 if scaled else ActivationFormat.FLOAT
        x = Activations(kind, values[shard], scale[shard] if scaled else None)
        push_rows(x, ids[shard], (table, counts), (row_places, scale_places, expert_places), HELD, shard)
    for shard in range(SHARDS):
        assert torch.equal(rows[shard], values.flatten(0, 1))
        assert torch.equal(scales[shard], scale.flatten() if scaled else torch.full((SHARDS * TOKENS,), 77.0))
        local = slot_of.flatten(0, 1) - HELD[0][shard]
        assert torch.equal(experts[shard], torch.where((local >= 0) & (local < HELD[1][shard]), local, -1))

assert torch.equal(counts, 2 * ids.flatten().bincount(minlength=6))  # of two runs

outputs = torch.randn(SHARDS, SHARDS * TOKENS * SLOTS, COLUMNS)
slots, slot_places = buffers(torch.float32, TOKENS, SLOTS, COLUMNS)
for shard in range(SHARDS):
    push_outputs(outputs[shard], experts[shard].flatten(), slot_places)
for shard in range(SHARDS):
    owner = (slot_of[shard] >= 4).int()
    for token in range(TOKENS):
        for slot in range(SLOTS):
            pair = (shard * TOKENS + token) * SLOTS + slot
            assert torch.equal(slots[shard][token, slot], outputs[owner[token, slot], pair])

flags, flag_places = buffers(torch.int32, SHARDS)
turn = torch.full((1,), 2**31 - 1, dtype=torch.int32)
flags[0][1] = -(2**31)  # the other one is here: the count has overflowed
meet(flag_places, flags[0], turn, 0)
assert int(turn) == int(flags[0][0]) == int(flags[1][0]) == -(2**31), (turn, flags)
"""

# Against the oracle in torch; queries beyond their table and of unused rows too.
KEY_LISTS = """
from aiter_emulation import listed_keys
from flyray.kernels.aiter import key_lists as aiter
from kernel_cases import paged

aiter._BLOCK = 8
batch, _ = paged([4, 0, 1, 2], [9, 3, 12, 2], 4, 3, 2)
batch.positions[6] = 99
batch.positions[5] = -1
for rows in (slice(0, 7), slice(2, 5), slice(6, 7)):
    for copies in (1, 4, 5):
        expected = listed_keys(batch, rows, 4, copies, 8)
        actual = aiter.key_lists(batch, rows, 4, copies, 8)
        for name, tensor in vars(expected).items():
            assert torch.equal(getattr(actual, name)[: len(tensor)], tensor), (rows, copies, name)
"""

# Entries of KV pages to the bit, and attention over them in the dtypes that the interpreter multiplies rightly.
ENTRIES = """
import torch
from kernel_cases import cached, empty_pages, normal, paged, unchanged
from flyray.kernels.reference import ReferenceKernels
from flyray.kernels.triton.attention import AttentionTile, mla_attention
from flyray.kernels.triton.attention_blocks import BlockTile
from flyray.kernels.triton.rows import rms_norm_quantize, write_kv

RANK, TILE = 38, AttentionTile(16, 32, 16, 4, 1)
batch, total = paged([3, 1], [45, 20], 8, 1, 2)
rows, q = normal(1, total * 8, RANK + 8), normal(3, 4, 3, RANK + 8)
finite = rows.clone().view(total, 8, -1)
rows[5], rows[7, 3] = 0.0, torch.inf
slots = torch.arange(-1, total * 8)  # one that is left out
for dtype in (torch.int8, torch.float8_e4m3fn):
    reference = ReferenceKernels(kv_dtype=dtype)
    expected, pages = cached(reference, rows.view(total, 8, -1), RANK), cached(reference, finite, RANK)
    actual = mla_attention(q, pages, batch, 0.3, RANK, TILE)
    assert torch.allclose(actual, reference.mla_attention(q, pages, batch, 0.3, RANK), rtol=0, atol=1e-5), dtype
    pages.view(torch.uint8).fill_(0xFF)
    write_kv(pages, slots, *unchanged(rows[slots], RANK))
    assert torch.equal(pages.view(torch.uint8), expected.view(torch.uint8)), dtype
# Normed and turned, in floats too; small whole numbers have the same sum of squares in any order.
x, norm, angles = normal(5, 9, 3 + RANK + 8).mul(3).round()[:, 3:], normal(6, RANK), (normal(7, 9, 4), normal(8, 9, 4))
slots, positions = torch.arange(9).flip(0), torch.arange(9)
_, normed = rms_norm_quantize(x[:, :RANK], norm, 1e-6, False)
assert torch.equal(normed.values, reference.rms_norm_quantize(x[:, :RANK], norm, 1e-6)[1].values)
for dtype in (torch.int8, torch.float32):
    reference = ReferenceKernels(kv_dtype=dtype)
    expected = empty_pages(reference, 3, 3, RANK, 8)
    pages = expected.clone()
    reference.write_kv(expected, slots, x, norm, 1e-6, positions, *angles)
    write_kv(pages, slots, x, norm, 1e-6, positions, *angles)
    if dtype is torch.float32:  # entries of two parts
        pages = pages.view(torch.bfloat16).unflatten(2, (2, -1)).float().sum(2)
    assert torch.allclose(pages.float(), expected.float(), rtol=2**-14 if dtype is torch.float32 else 0, atol=0), dtype
actual = mla_attention(q, finite.half(), batch, 0.3, RANK, TILE)
expected = ReferenceKernels().mla_attention(q, finite, batch, 0.3, RANK)
assert torch.allclose(actual, expected, rtol=0, atol=1e-2)
# One program a query, a block each, and what lies between; 45 entries are longer than what one program adds up. What
# the interpreter multiplies is NumPy's: only a GPU can show that its own products are equal.
BLOCKS = [BlockTile(16, 8, 16, 4, 2, 4, programs, 4, 4, 1) for programs in (4, 17, 400)]
whole, *others = (mla_attention(q, finite, batch, 0.3, RANK, tile) for tile in BLOCKS)
assert torch.allclose(whole, expected, rtol=0, atol=1e-5)
assert all(torch.equal(whole, other) for other in others)
far = finite.clone()
far[..., 0] *= 400.0  # blocks of no weight beside others
near, *others = (mla_attention(q, far, batch, 0.3, RANK, tile) for tile in BLOCKS)
assert all(torch.equal(near, other) for other in others)
assert torch.allclose(near, ReferenceKernels().mla_attention(q, far, batch, 0.3, RANK), rtol=1e-4, atol=1e-4)
finite[int(batch.page_table[1, 0]), 0, 3] = torch.nan
assert all(mla_attention(q, finite, batch, 0.3, RANK, tile)[3].isnan().all() for tile in BLOCKS)
"""

# Tokens drawn by programs that share a row: ties at the last kept, a list that is too long, all of the filters.
DRAWS = """
import torch
from kernel_cases import normal
from flyray.kernels.protocol import SamplingRow
from flyray.kernels.sampling import SamplingRows, sample
from flyray.kernels.triton import drawing

drawing._PART, drawing._LISTED, drawing._CHUNK = 64, 32, 32
rows = [
    SamplingRow(0.0, 1.0, 0, 1, 2),
    SamplingRow(0.0, 1.0, 0, 1, 2),
    SamplingRow(1.0, 0.95, 0, 3, 4),
    SamplingRow(0.7, 1.0, 13, 5, 6),
    SamplingRow(1.0, 0.5, 0, 7, 8),
    SamplingRow(2.5, 0.9, 50, 9, 10, 0.1),
    SamplingRow(1e-40, 1.0, 0, 11, 12),
    SamplingRow(1e300, 1.0, 10**30, 13, 14),
]
logits = normal(9, 8, 100) * 2
logits[1:4] = logits[1:4].round()
logits[1, :7], logits[1, 7:] = -0.0, 0.0
logits[4] = 3.0
logits[7, ::3] = -torch.inf
found, expected = drawing.draw(logits, SamplingRows(rows).words), sample(logits, rows)
assert torch.equal(found.tokens, expected.tokens), (found.tokens, expected.tokens)
assert torch.equal(found.logprobs, expected.logprobs)
assert torch.equal(found.largest, logits.amax(1))
for value in (torch.nan, torch.inf):
    logits[2, 70] = value
    found = drawing.draw(logits[2:3], SamplingRows(rows[2:3]).words)
    assert torch.equal(found.largest, logits[2:3].amax(1)) or bool(found.largest.isnan()), value
    assert 0 <= int(found.tokens) < 100
"""


def test_integer_products_and_peers_in_the_interpreter() -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent / "support"))),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + PEERS + KEY_LISTS + ENTRIES + DRAWS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
