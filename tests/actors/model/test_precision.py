"""The precision plan: truthful rows, and refusals that say what to run instead."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepseek_oracle import NATIVE, published_tensors, random_model, save_checkpoint, small_text, write_native

from flyray.actors.checkpoint import Checkpoint, CheckpointError
from flyray.actors.model.config import ModelConfig
from flyray.actors.precision import PrecisionError, memory_format, precision_plan
from flyray.kernels.formats import FORMATS
from flyray.kernels.select import select_kernels

ALLOWED = {
    "w4a16": {"w4a16", "bf16", "w4a8", "w8a8"},
    **{disk: {disk} for disk in FORMATS if disk != "w4a16"},
}


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("disk", FORMATS)
def test_which_precision_goes_with_which_checkpoint(disk: str, precision: str) -> None:
    assert memory_format(disk, "auto") == disk
    if precision in ALLOWED[disk]:
        assert memory_format(disk, precision) == precision
    else:
        with pytest.raises(PrecisionError, match=f"'{precision}' cannot be loaded from a {disk} checkpoint"):
            memory_format(disk, precision)


def test_refusals_say_what_to_run() -> None:
    with pytest.raises(PrecisionError, match=r"flyray quantize SRC DST --format w8a8-fp8"):
        memory_format("w4a16", "w8a8-fp8")
    with pytest.raises(PrecisionError, match=r"start from a checkpoint in w4a8"):
        memory_format("w8a8", "w4a8")
    with pytest.raises(PrecisionError, match=r"'int4' is unknown; 'auto' or one of bf16"):
        memory_format("w4a16", "int4")


def test_plan_of_a_native_checkpoint(tmp_path: Path) -> None:
    tensors = published_tensors(random_model(small_text(), 2), write_native)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    checkpoint = Checkpoint(save_checkpoint(tmp_path, small_text(), tensors, NATIVE))
    config = ModelConfig.from_dict(checkpoint.config)
    plan = precision_plan(config, checkpoint, "w4a8", select_kernels("reference", 1))
    assert (plan.disk, plan.memory) == ("w4a16", "w4a8")
    rows = {row.kind: row for row in plan.rows}
    assert list(rows) == [
        "embedding",
        "attention",
        "norms",
        "dense MLP",
        "gate",
        "gate bias",
        "shared experts",
        "routed experts gate/up",
        "routed experts down",
        "activations of experts",
        "lm_head",
        "KV cache",
    ]
    assert rows["norms"].disk == "bf16, f32"
    down = rows["routed experts down"]
    assert (down.disk, down.memory) == ("INT4 g32, bf16 scales", "INT4 g32, u4 multipliers")
    assert (down.activations, down.kernel) == ("INT8 per token and expert", "reference.experts")
    assert rows["KV cache"].memory == f"f32, {4 * config.num_hidden_layers * config.kv_width} B a token"
    lines = plan.lines()
    column = lines[0].index("memory")
    for line, row in zip(lines[1:], plan.rows, strict=True):
        assert line.startswith(row.kind)
        assert line[column - 2 : column + len(row.memory)] == f"  {row.memory}"
    assert checkpoint.bytes_read == 0


def test_plan_names_the_tensor_that_does_not_fit(tmp_path: Path) -> None:
    tensors = published_tensors(random_model(small_text(), 2), write_native)
    del tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    checkpoint = Checkpoint(save_checkpoint(tmp_path, small_text(), tensors, NATIVE, "language_model."))
    config = ModelConfig.from_dict(checkpoint.config)
    with pytest.raises(CheckpointError, match=r"language_model\.model\.layers\.2\.mlp\.gate\.e_score_correction_bias"):
        precision_plan(config, checkpoint, "auto", select_kernels("reference", 1))
