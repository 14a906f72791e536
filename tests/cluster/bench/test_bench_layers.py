"""The layers' benchmark on small models: what it finds, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_checkpoint import ARCHITECTURE

from flyray.cluster.bench.layer_shard import Prompts
from flyray.cluster.bench.layers import LayerSettings, bench_layers
from flyray.cluster.bench.rounds import BenchUsageError


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ARCHITECTURE))
    return str(path)


def test_one_and_two_shards_are_measured_and_give_the_same_tokens(model: str) -> None:
    settings = LayerSettings(
        model, 4, ("w4a8",), (3,), (Prompts(2, 16),), 24, (1, 2), "cpu", 1, 1, 1, ("head",), ("shared",)
    )
    lines: list[str] = []
    found = bench_layers(settings, lines.append)
    figures = {figure.name: figure.value for figure in found.figures()}
    alone, together = found.decodes()
    assert figures["same_tokens.b3.w4a8.g2"] == 1.0
    # Three MoE layers, 3 rows of 3 experts each; on two shards one more row fills the batch up.
    assert 3 <= alone.touched <= 8
    assert (alone.rows, together.rows) == (3, 2)
    assert alone.step_s > 0 < together.step_s
    assert {"us_per_moe_layer.b3.w4a8", "us_per_moe_layer.b3.w4a8.g2", "us_per_moe_layer.p2x16.w4a8"} <= set(figures)
    assert figures["layers"] == 4
    assert any(line.startswith("w4a8, batch 3") for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formats": ("w3a8",)}, "format: 'w3a8' is unknown; known are bf16"),
        ({"backend": "cuda"}, "backend: 'cuda' is unknown; known are cpu"),
        ({"prompt_attention": "long"}, "prompt_attention: 'long' is unknown; known are absorbed, expanded"),
        ({"prompt_attention": "expanded", "backend": "cpu"}, "prompt_attention: 'expanded', but the backend 'cpu' has"),
        ({"int8_weights": ("experts",)}, "int8_weights: 'experts' is unknown"),
        ({"layers": 2}, "layers: 2 leaves no two depths with experts; at least 3 are needed"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(model: str, changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"model": model, "layers": 3, "formats": ("w4a8",), "batches": (1,)} | changes
    with pytest.raises(BenchUsageError, match=message):
        LayerSettings(**arguments).config()  # pyright: ignore[reportArgumentType]


def test_more_gpus_than_there_are_is_a_usage_error(model: str) -> None:
    settings = LayerSettings(model, 3, ("w4a8",), (1,), gpus=(1, 1000))
    with pytest.raises(BenchUsageError, match="gpus: 1000 with the backend 'triton', and torch finds "):
        bench_layers(settings, print)


@pytest.mark.parametrize(("text", "prompts"), [("2048", Prompts(1, 2048)), ("8x32", Prompts(8, 32))])
def test_prompts_are_read_as_they_are_shown(text: str, prompts: Prompts) -> None:
    assert Prompts.parse(text) == prompts
    assert str(prompts) == text


@pytest.mark.parametrize("text", ["", "0", "8x", "x8", "2x3x4", "-3"])
def test_what_is_no_prompt_is_refused(text: str) -> None:
    with pytest.raises(BenchUsageError, match="is neither a number of tokens nor COUNTxTOKENS"):
        Prompts.parse(text)
