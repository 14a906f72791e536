"""Quark's calibrated algorithms on a small random model: the same model in, a better rounding out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepseek_oracle import relative
from tiny_checkpoint import write_tiny

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.single import SingleProcessModel
from flyray.cluster.quantize import quark_in_memory
from flyray.cluster.quantize.matrix import QuantizeError, dequantize
from flyray.cluster.quantize.quark_in_memory import ALGORITHMS, Prediction, load_model, predict, quantize_model
from flyray.kernels.select import select_kernels

WINDOWS = [torch.randint(3, 256, (48,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(12)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(write_tiny(tmp_path_factory.mktemp("memory") / "model"))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint) -> dict[str, Prediction]:
    reference = load_model(checkpoint)
    return {
        algorithm: predict(quantize_model(load_model(checkpoint), algorithm, 4, WINDOWS).model, reference, WINDOWS)
        for algorithm in ALGORITHMS
    }


def test_the_loaded_model_is_flyray_s(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """flyray's w4a16 rounds the weights to bfloat16, as compressed-tensors does; so they are here, for once."""
    ours = SingleProcessModel.load(checkpoint.path, "w4a16", select_kernels("reference", 1), 64).prefill(WINDOWS[0])
    monkeypatch.setattr(quark_in_memory, "dequantize", lambda *given: dequantize(*given).bfloat16())
    model = load_model(checkpoint)
    with torch.no_grad():
        logits = model(torch.tensor([WINDOWS[0]]), use_cache=False).logits[0]
    assert relative(ours, logits) < 1e-5
    same = predict(model, model, WINDOWS[:1])
    assert (same.kl, same.top1) == (0, 1)


def test_error_feedback_is_better_than_plain_rounding(found: dict[str, Prediction]) -> None:
    assert 0 < found["gptq"].kl < found["nearest"].kl


def test_smoothing_keeps_the_model(found: dict[str, Prediction]) -> None:
    """An uncorrected gate or shared expert would cost far more than the rounding does."""
    for algorithm in ("awq", "smoothquant"):
        assert 0 < found[algorithm].kl < 2 * found["nearest"].kl


def test_experts_that_calibration_never_reached_are_named_and_kept(checkpoint: Checkpoint) -> None:
    few = [WINDOWS[0][:2]]
    quantized = quantize_model(load_model(checkpoint), "gptq", 8, few)
    assert quantized.unreached
    plain = load_model(checkpoint)
    for name in quantized.unreached:
        for kind in ("gate_proj", "up_proj", "down_proj"):
            weight = quantized.model.get_submodule(f"{name}.{kind}").weight
            source = plain.get_submodule(f"{name}.{kind}").weight
            assert float((weight - source).norm() / source.norm()) < 0.1, name


def test_windows_of_several_lengths_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(QuantizeError, match="must all have one length"):
        quantize_model(load_model(checkpoint), "gptq", 4, [[1, 2, 3], [1, 2]])


def test_another_format_is_refused(tmp_path: Path) -> None:
    from deepseek_oracle import QUANTIZATION, WRITERS, published_tensors, random_model, save_checkpoint, small_text

    text = small_text(num_hidden_layers=2)
    tensors = published_tensors(random_model(text, 1), WRITERS["w8a8"])
    path = save_checkpoint(tmp_path, text, tensors, QUANTIZATION["w8a8"])
    with pytest.raises(QuantizeError, match="is quantized to w8a8; a native or bf16 one is needed"):
        load_model(Checkpoint(path))
