"""The model that is measured is made once, whole; peers get the same weights; routing is counted by layer and step."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_checkpoint import TINY, write_tiny
from transformers import DeepseekV3ForCausalLM

from flyray.actors.model.config import ModelConfig
from flyray.actors.model.single import SingleProcessModel
from flyray.cluster.bench.model import find_model
from flyray.cluster.bench.published_folder import published_folder
from flyray.cluster.bench.routing import distinct, touched_experts
from flyray.cluster.bench.traffic import LinearBits
from flyray.cluster.synthesize import Synthesis
from flyray.kernels.reference import ReferenceKernels


def test_bench_1b_is_the_model_of_934_million_parameters_with_283_million_active() -> None:
    config = ModelConfig.from_dict(Synthesis("bench-1b").config())
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    assert (config.hidden_size, config.num_hidden_layers, config.n_routed_experts) == (1024, 12, 32)
    assert len(config.moe_layers) * config.n_routed_experts * expert == 761_266_176


def test_a_shape_is_made_once_and_kept_under_a_name_of_its_content(tmp_path: Path) -> None:
    import json

    shape = tmp_path / "small.json"
    content = {key: value for key, value in TINY.items() if key != "quantization_config"}
    shape.write_text(json.dumps({"model_type": "kimi_k25", "text_config": content}))
    said: list[str] = []
    kept = find_model(str(shape), tmp_path / "work", said.append)
    times = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert find_model(str(shape), tmp_path / "work", said.append) == kept
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == times
    assert len(said) == 1
    shape.write_text(shape.read_text().replace('"n_routed_experts": 8', '"n_routed_experts": 16'))
    assert find_model(str(shape), tmp_path / "work", said.append) != kept
    assert sorted(path.name for path in (tmp_path / "work").iterdir() if path.name.startswith("bench")) == []


def test_a_checkpoint_is_measured_where_it_lies(tmp_path: Path) -> None:
    assert find_model(str(write_tiny(tmp_path / "model")), tmp_path / "work", print) == tmp_path / "model"
    assert not (tmp_path / "work").exists()


def test_peers_compute_the_same_logits_from_the_published_folder(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model")
    tokens = [5, 200, 17, 3, 90, 41, 8, 133]
    folder = published_folder(source, tmp_path / "work")
    assert published_folder(source, tmp_path / "work") == folder
    assert folder.parent == tmp_path / "work"
    peer = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = peer(torch.tensor([tokens])).logits[0]
        found = SingleProcessModel.load(source, "auto", ReferenceKernels(), 16).prefill(tokens)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


def test_distinct_experts_are_counted_over_the_sequences_of_a_step() -> None:
    # Two sequences, one layer, two steps, two experts each: {1, 2} with {2, 3}, and {0, 5} twice.
    chosen = torch.tensor([[[[1, 2], [0, 5]]], [[[3, 2], [5, 0]]]])
    assert distinct(chosen) == (3 + 2) / 2


def test_a_sequence_alone_touches_as_many_experts_as_a_token_chooses(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "model")
    texts = [[(7 * place + start) % 256 for place in range(30)] for start in (0, 90)]
    assert touched_experts(source, "w4a8", LinearBits(), texts[:1], 10, 1) == 3
    assert 3 < touched_experts(source, "w4a8", LinearBits(("attention", "head"), ("shared",)), texts, 10, 1) <= 6
