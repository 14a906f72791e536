"""Random checkpoints: readable, of the law asked for, a function of the seed, and refused where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.tensors import check_tensors, shard_tensors
from flyray.actors.weight_formats import WeightFormats
from flyray.cluster.cli import app
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.synthesize import Synthesis, SynthesizeError, synthesize
from flyray.kernels.formats import dequantize_native

SMALL = {
    "num_hidden_layers": 2,
    "n_routed_experts": 8,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "intermediate_size": 192,
    "vocab_size": 512,
    "q_lora_rank": 40,
}


@pytest.mark.parametrize("format", ["w4a16", "bf16"])
def test_every_tensor_of_the_architecture_is_there(tmp_path: Path, format: str) -> None:
    total = synthesize(tmp_path, Synthesis(changes=SMALL, format=format), progress=False)
    checkpoint = Checkpoint(tmp_path)
    config = ModelConfig.from_dict(checkpoint.config)
    assert checkpoint.expert_format() == format
    assert (
        check_tensors(checkpoint, shard_tensors(config, WeightFormats(format), range(config.n_routed_experts))) == total
    )


def _weights(folder: Path, law: str, seed: int = 0) -> torch.Tensor:
    synthesize(folder, Synthesis(changes=SMALL, law=law, seed=seed), progress=False)
    checkpoint = Checkpoint(folder)
    names = [f"model.layers.1.mlp.experts.{expert}.up_proj" for expert in range(8)]
    parts = [(checkpoint.read(f"{name}.weight_packed"), checkpoint.read(f"{name}.weight_scale")) for name in names]
    return torch.cat([dequantize_native(*part, dtype=torch.float32) for part in parts])


# Kurtosis: 3 for Gaussian, 6 for Laplace, 9 for Student-t with 5 degrees of freedom, whose sample values scatter.
@pytest.mark.parametrize(("law", "low", "high"), [("gaussian", 2.8, 3.2), ("laplace", 5, 7), ("student-t5", 6.5, 30)])
def test_weights_have_the_scale_and_the_tails_of_their_law(tmp_path: Path, law: str, low: float, high: float) -> None:
    weights = _weights(tmp_path, law) * 256**0.5
    assert float(weights.std()) == pytest.approx(1, abs=0.03)
    kurtosis = float((weights - weights.mean()).pow(4).mean() / weights.var() ** 2)
    assert low < kurtosis < high


def test_a_seed_gives_one_checkpoint(tmp_path: Path) -> None:
    one, same, other = (_weights(tmp_path / name, "gaussian", seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (Synthesis(model="kimi-k3"), "model: 'kimi-k3' is none of bench-1b, kimi-k2.5"),
        (Synthesis(changes={"hiden_size": 64}), "hiden_size: no number .*did you mean 'hidden_size'"),
        (Synthesis(changes={"hidden_size": 48}), "hidden_size and moe_intermediate_size: .* multiples of 32"),
        (Synthesis(changes={"n_routed_experts": 4}), "num_experts_per_tok"),
        (Synthesis(law="cauchy"), "law: 'cauchy' is none of gaussian, laplace, student-t5"),
        (Synthesis(format="w8a8"), "format: 'w8a8' is neither w4a16 nor bf16"),
        (Synthesis(changes=SMALL | {"vocab_size": 10**12}), "GB are needed"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path: Path, what: Synthesis, message: str) -> None:
    with pytest.raises((SynthesizeError, QuantizeError), match=message):
        synthesize(tmp_path / "new", what, progress=False)
    assert not (tmp_path / "new").exists()


def test_the_command_says_what_is_wrong_and_what_it_wrote(tmp_path: Path) -> None:
    runner = CliRunner()
    changes = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
    done = runner.invoke(app, ["synthesize", str(tmp_path / "new"), *changes])
    assert done.exit_code == 0, done.output
    assert "GB" in done.output
    again = runner.invoke(app, ["synthesize", str(tmp_path / "new"), *changes])
    assert again.exit_code == 2
    assert "not an empty folder" in again.output
    assert runner.invoke(app, ["synthesize", str(tmp_path / "x"), "--set", "vocab_size"]).exit_code == 2
