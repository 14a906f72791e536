"""Every Triton kernel compiles for gfx942 at Kimi-K2.5's shapes: no spills, no scratch, 64 KiB of LDS, matrix units.

Compiled alone: no such GPU is here to run them. Numerics of the same source are tested on CUDA (test_triton_gpu.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.amd")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flyray.kernels.aiter import key_lists  # noqa: E402
from flyray.kernels.protocol import Bf16Matrix, ExpertMatrix, Fp8Matrix, Int4Matrix, Int8Matrix  # noqa: E402
from flyray.kernels.triton import (  # noqa: E402
    absorb,
    attention,
    experts,
    gate,
    grouping,
    linear,
    peers,
    quantize,
    rows,
    sampling,
)
from flyray.kernels.triton.tiles import TileTable  # noqa: E402

LDS_BYTES = 65536
BYTES, HALF, FLOAT, INT, LONG = "*u8", "*bf16", "*fp32", "*i32", "*i64"
SIGNED = "*i8"


@dataclass(frozen=True)
class Case:
    """A kernel with its pointers' types, its constants, and the matrix instruction that it must have."""

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    instruction: str = ""
    warps: int = 4
    stages: int = 2
    scalars: dict[str, str] = field(default_factory=dict)


def expert_case(kind: type[ExpertMatrix], gated: bool, pairs: int) -> Case:
    tile = TileTable.of("gfx942").tile(kind, gated, pairs)
    code = (Int4Matrix, Int8Matrix, Fp8Matrix, Bf16Matrix).index(kind)
    instruction = ("v_mfma_i32", "v_mfma_i32", "v_mfma_f32_.*f16", "v_mfma_f32_.*bf16")[code]
    pointers = {
        "x": (SIGNED, SIGNED, BYTES, FLOAT)[code], "tiles": (INT, SIGNED, BYTES, HALF)[code], "x_scale": FLOAT,
        "multipliers": BYTES, "scale": FLOAT, "pair_row": INT, "order": INT, "block_expert": INT, "out": FLOAT,
    }  # fmt: skip
    constants = {
        "INNER": 7168 if gated else 2048, "KIND": code, "SIZE": tile.rows, "ROWS": 128, "GATED": gated,
        "SORTED": True, "STAGES": tile.stages,
    }  # fmt: skip
    return Case(experts.expert_products, pointers, constants, instruction, tile.warps, tile.stages)


def integer_case(int4: bool) -> Case:
    pointers = {
        "x": SIGNED, "values": INT if int4 else SIGNED, "multipliers": BYTES, "x_scale": FLOAT, "scale": FLOAT,
        "out": FLOAT, "parts": INT,
    }  # fmt: skip
    constants = {"INT4": int4, "IN_TURN": False, "SIZE": 16, "ROWS": 64, "EVEN": True, "SPLIT": True, "STAGES": 2}
    return Case(linear.integer_products, pointers, constants, "v_mfma_i32")


def attention_case(kv_dtype: torch.dtype) -> Case:
    tile, parts = attention.attention_tile(kv_dtype, "gfx942"), kv_dtype.itemsize // 2
    pointers = {
        "q": HALF if parts == 1 else FLOAT, "pages": HALF, "query_start": INT, "page_table": INT, "positions": LONG,
        "sums": HALF if parts == 1 else FLOAT, "tops": FLOAT,
    }  # fmt: skip
    constants = {
        "heads": 64, "LATENT": 512, "ROPE": 64, "ROPE_2": 64, "SEQUENCES": 64, "PARTS": parts, "HEADS": tile.heads,
        "KEYS": tile.keys, "COLUMNS": tile.columns, "MAX_SPLITS": 64, "STAGES": tile.stages,
    }  # fmt: skip
    return Case(
        attention.attend_splits, pointers, constants, "v_mfma_f32_.*bf16", tile.warps, tile.stages,
        scalars={"scale": "fp32"},
    )  # fmt: skip


CASES: dict[str, Case] = {
    f"experts {kind.__name__} {'gate_up' if gated else 'down'} {regime}": expert_case(kind, gated, pairs)
    for kind in (Int4Matrix, Int8Matrix, Fp8Matrix, Bf16Matrix)
    for gated in (True, False)
    for regime, pairs in (("decode", 512), ("prefill", 16384))
    if regime == "decode" or kind is Int4Matrix or gated
}
CASES |= {
    "linear int8": integer_case(False),
    "linear int4": integer_case(True),
    "linear bf16": Case(
        linear.float_products, {"x": FLOAT, "weight": HALF, "out": FLOAT},
        {"SIZE": 16, "ROWS": 64, "COLUMNS": 64, "CHUNK": 512, "SPLIT": True}, "v_mfma_f32_.*bf16",
    ),
    "linear chunks": Case(linear.add_chunks, {"parts": FLOAT, "out": FLOAT}, {"BLOCK": 512}),
    "linear unpacking": Case(
        linear.unpack_weight, {"nibbles": BYTES, "multipliers": BYTES, "values": SIGNED}, {"GROUPS": 128}
    ),
    "mlp hidden": Case(
        linear.hidden_rows, {"parts": INT, "x_scale": FLOAT, "scale": FLOAT, "values": SIGNED, "out_scale": FLOAT},
        {"PARTS": 4, "SIZE": 2048},
    ),
    "linear epilogue": Case(
        linear.integer_epilogue, {"parts": INT, "x_scale": FLOAT, "scale": FLOAT, "out": FLOAT},
        {"PARTS": 8, "IN_TURN": False, "BLOCK": 512},
    ),
    "attention": attention_case(torch.bfloat16),
    "AITER's lists of keys": Case(
        key_lists.list_keys,
        {"positions": LONG, **dict.fromkeys(
            ("query_start", "page_table", "queries", "starts", "slots", "last_lengths", "splits"), INT
        )},
        {"COPIES": 4, "COPIES_2": 4, "SPLITS": 8, "ROWS": 128, "SEQUENCES": 256, "BLOCK": 2048},
    ),
    "attention float32 pages": attention_case(torch.float32),
    "attention merge": Case(
        attention.merge_splits, {"sums": HALF, "tops": FLOAT, "positions": LONG, "out": FLOAT},
        {"LATENT": 512, "LATENT_2": 512, "KEYS": 128, "MAX_SPLITS": 64},
    ),
    "absorb": Case(
        absorb.absorb_heads,
        {"q": FLOAT, "weight": HALF, "positions": LONG, "cos": FLOAT, "sin": FLOAT, "out": HALF},
        {"INNER": 128, "LATENT": 512, "PAIRS": 32, "PAIRS_2": 32, "SIZE": 16, "ROWS": 64, "COLUMNS": 128},
        "v_mfma_f32_.*bf16",
    ),
    "gate": Case(
        gate.choose_experts, {"logits": FLOAT, "bias": FLOAT, "ids": INT, "weights": FLOAT},
        {"GROUPS": 1, "SIZE": 512, "N_GROUP": 1, "TOPK_GROUP": 1, "TOP_K": 8, "NORM": True},
        scalars={"factor": "fp32"},
    ),
    "sample": Case(
        sampling.greedy_rows, {"logits": FLOAT, "tokens": LONG, "largest": FLOAT, "weights": LONG},
        {"POWER": float(2**44), "MAGIC": 6755399441055744.0, "BLOCK": 4096}, warps=8,
    ),
    "group at once": Case(
        grouping.group_at_once, {"pair_expert": INT, "order": INT, "block_expert": INT, "cursor": INT},
        {"EXPERTS": 512, "SIZE": 16, "CHUNK": 1024}, warps=8,
    ),
    "count pairs": Case(
        grouping.count_pairs, {"pair_expert": INT, "order": INT, "block_expert": INT, "counts": INT},
        {"EXPERTS": 512, "SIZE": 64, "CHUNK": 1024},
    ),
    "place blocks": Case(
        grouping.place_blocks, {"counts": INT, "cursor": INT, "block_expert": INT}, {"EXPERTS": 512, "SIZE": 64}
    ),
    "scatter pairs": Case(
        grouping.scatter_pairs, {"pair_expert": INT, "cursor": INT, "order": INT}, {"CHUNK": 1024}
    ),
    "push row": Case(
        peers.push_row,
        dict.fromkeys(("value_places", "scale_places", "expert_places"), LONG)
        | {"values": INT, "scale": FLOAT, "ids": INT, "table": INT, "counts": INT}
        | {"first_slot": INT, "held": INT},
        {"SCALED": True, "WORDS": 2048, "SLOTS": 8},
    ),
    "push output": Case(
        peers.push_output, {"outputs": FLOAT, "pair_expert": INT, "places": LONG}, {"BLOCK": 2048}
    ),
    "meet": Case(
        peers.meet_peers, {"flag_places": LONG, "flags": INT, "turn": INT}, {"SHARDS": 8}, warps=1
    ),
    "quantize int8": Case(
        quantize.quantize_rows, {"x": FLOAT, "values": SIGNED, "scale": FLOAT}, {"SIZE": 8192, "FP8": False}, warps=8
    ),
    "quantize fp8": Case(
        quantize.quantize_rows, {"x": FLOAT, "values": BYTES, "scale": FLOAT}, {"SIZE": 8192, "FP8": True}, warps=8
    ),
    "rms_norm": Case(
        rows.rms_norm_rows, {"x": FLOAT, "weight": HALF, "out": FLOAT, "codes": SIGNED, "scale": FLOAT},
        {"SIZE": 8192, "QUANTIZED": True}, warps=8, scalars={"eps": "fp32"},
    ),
    "take_rows": Case(rows.copy_rows, {"table": HALF, "rows": LONG, "out": FLOAT}, {"BLOCK": 1024}),
    "rope": Case(
        rows.rope_rows, {"x": FLOAT, "positions": LONG, "cos": FLOAT, "sin": FLOAT, "out": FLOAT}, {"PAIRS": 2048}
    ),
    "silu_mul": Case(rows.silu_mul_rows, {"gate_up": FLOAT, "out": FLOAT}, {"BLOCK": 1024}),
    "combine": Case(
        rows.combine_slots,
        dict.fromkeys(("slots", "weights", "shared", "residual", "out"), FLOAT), {"TOP_K": 8, "BLOCK": 1024}
    ),
    "write_kv": Case(
        rows.write_entries, {"pages": HALF, "slots": LONG, "latent": FLOAT, "k_rope": FLOAT}, {"PARTS": 1, "SIZE": 1024}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gfx942(name: str) -> None:
    case = CASES[name]
    names = case.kernel.arg_names
    kinds = {
        n: case.pointers.get(n) or ("constexpr" if n in case.constants else case.scalars.get(n, "i32")) for n in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in case.pointers}
    source = ASTSource(case.kernel, kinds, case.constants, aligned)
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
    assembly = built.asm["amdgcn"]
    assert number(assembly, "vgpr_spill_count") == number(assembly, "sgpr_spill_count") == 0
    assert number(assembly, "private_segment_fixed_size") == 0, "scratch memory"
    assert number(assembly, "group_segment_fixed_size") <= LDS_BYTES
    assert built.metadata.shared <= LDS_BYTES
    if case.instruction:
        assert re.search(case.instruction, assembly)


def number(assembly: str, field_name: str) -> int:
    """From the kernel's metadata."""
    found = re.search(rf"\.{field_name}:\s*(\d+)", assembly)
    assert found is not None
    return int(found[1])
