"""Faults of the installed AMD Quark that flyray works around, each with the place of its workaround.

A test passes while the fault is there, and says what to drop once it is gone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from source_checkpoints import EXPERTS, PREFIX, bf16_checkpoint, native_checkpoint, native_tensors, scattered_checkpoint
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from flyray.cluster.quantize.quark_quantizer import import_quark, quark_quantizer, quark_round
from flyray.kernels import formats

MATRIX = "model.layers.1.mlp.experts.0.up_proj"
QUANTIZER = "cluster/quantize/quark_quantizer.py"


def there(fault: bool, what: str, workaround: str) -> None:
    """Fails, saying what to do, if the fault is gone."""
    assert fault, f"Quark {metadata.version('amd-quark')} has mended {what}: drop the workaround in {workaround}"


@dataclass(frozen=True)
class Export:
    """Quark's own file-to-file export of the native checkpoint. source: the matrix's weights [N, K]."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    source: torch.Tensor

    def error(self, values: torch.Tensor, scale: torch.Tensor) -> float:
        """Relative, of values [N, K] with one scale a row or a group of 32."""
        each_group = scale.dim() == 2
        weight = formats.dequantize_groups(values, scale) if each_group else formats.dequantize_rows(values, scale)
        return float((weight - self.source).norm() / self.source.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    native_checkpoint(folder / "native")
    bf16_checkpoint(folder / "bf16")
    return folder


def _export(folder: Path, scheme: str) -> Export:
    quark = import_quark()
    config = quark.LLMTemplate.get("kimi_k25").get_config(scheme=scheme)
    quark.ModelQuantizer(config).direct_quantize_checkpoint(str(folder / "native"), str(folder / scheme), device="cpu")
    stored = {}
    for file in (folder / scheme).glob("*.safetensors"):
        stored |= load_file(file)
    at = f"{PREFIX}{MATRIX}."
    native = native_tensors()
    return Export(
        {name.removeprefix(at): tensor for name, tensor in stored.items() if name.startswith(at)},
        json.loads((folder / scheme / "config.json").read_text())["quantization_config"],
        formats.dequantize_native(native[f"{at}weight_packed"], native[f"{at}weight_scale"], torch.float32),
    )


@pytest.fixture(scope="module")
def per_channel(folder: Path) -> Export:
    return _export(folder, "int4_wo_per_channel")


@pytest.fixture(scope="module")
def per_group(folder: Path) -> Export:
    return _export(folder, "int4_wo_32")


def linear_order(packed: torch.Tensor) -> torch.Tensor:
    """Two's complement nibbles, least significant first, [N, K/8] int32 -> [N, K] int8."""
    return formats.unpack_native(packed ^ torch.tensor(-0x77777778, dtype=torch.int32))


def test_int4_of_one_stage_is_not_packed_as_it_says(per_channel: Export) -> None:
    packed, scale = per_channel.tensors["weight"], per_channel.tensors["weight_scale"]
    assert per_channel.config["export"]["pack_method"] == "reorder"
    said, found = (per_channel.error(unpack(packed), scale) for unpack in (formats.unpack_awq, linear_order))
    assert min(said, found) < 0.2
    there(found < said, "the packing of one-stage INT4", f"{QUANTIZER}: SCHEMES may have int4_wo_* as well")


def test_int4_groups_are_not_what_quark_s_own_loader_expects(per_group: Export) -> None:
    config = import_quark().LLMTemplate.get("kimi_k25").get_config(scheme="int4_wo_32").global_quant_config.weight
    from quark.torch.utils.pack import create_pack_method

    expected = create_pack_method(qscheme="per_group", dtype="int4").infer_packed_shape(
        unpacked_shape=tuple(per_group.source.shape), quantization_spec=config, legacy=False, custom_mode="quark"
    )
    assert tuple(per_group.tensors["weight"].shape) == expected[0]
    what, workaround = "the layout of INT4 groups", f"{QUANTIZER}: SCHEMES may have int4_wo_32 as well"
    there(tuple(per_group.tensors["weight_scale"].shape) != expected[1], what, workaround)
    there("weight_zero_point" not in per_group.tensors, what, workaround)


def test_native_groups_do_not_survive_quark_s_rounding(per_group: Export) -> None:
    """Quark divides by absmax / 7.5, the native format by absmax / 7."""
    values = linear_order(per_group.tensors["weight"]).T.contiguous()  # packed along the rows
    lost = per_group.error(values, per_group.tensors["weight_scale"])
    values, scale = formats.quantize_native(per_group.source)
    assert per_group.error(values, scale) == 0
    there(lost > 0.05, "rounding INT4 groups of 32 to themselves", "cluster/quantize/matrix.py: w4a8 keeps the nibbles")
    assert lost == pytest.approx(0.067, abs=0.01)


def test_weights_apart_from_their_scales_are_not_found(tmp_path: Path) -> None:
    source = scattered_checkpoint(tmp_path / "source")
    try:
        quark_quantizer("w8a8").direct_quantize_checkpoint(str(source), str(tmp_path / "target"), device="cpu")
    except KeyError:  # weight_packed, where only the scale is
        found = False
    else:
        made = [name for file in (tmp_path / "target").glob("*.safetensors") for name in load_file(file)]
        found = f"{PREFIX}{MATRIX}.weight_scale" in made
    there(not found, "scales in another file than the weights", f"{QUANTIZER}: matrices are staged in one file")


def test_the_target_is_emptied_at_the_start_and_removed_on_an_error(folder: Path, tmp_path: Path) -> None:
    what = "the removal of the target folder"
    workaround = f"{QUANTIZER}: Quark's target may be the user's folder"
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    quark_quantizer("w8a8").direct_quantize_checkpoint(str(folder / "bf16"), str(target), device="cpu")
    there(not (target / "notes.txt").exists(), what, workaround)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (broken / "model.safetensors").write_bytes(b"\0" * 16)
    with pytest.raises(Exception, match=r"(?i)header|safetensor|deserializ"):
        quark_quantizer("w8a8").direct_quantize_checkpoint(str(broken), str(target), device="cpu")
    there(not target.exists(), what, workaround)


def test_the_default_device_is_a_gpu() -> None:
    function = import_quark().ModelQuantizer.direct_quantize_checkpoint
    assert inspect.signature(function).parameters["device"].default is None
    from quark.torch.quantization.file2file_quantization import _resolve_legacy_positional_device_arg

    default = _resolve_legacy_positional_device_arg((), None, "direct_quantize_checkpoint")
    there(default == "cuda", "the default device", f"{QUANTIZER}: device=")


def test_scales_of_bf16_weights_are_rounded_to_bf16() -> None:
    """No workaround, so that the bytes are Quark's own: `by: flyray` computes them in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(256, 512, generator=generator) * 0.05).bfloat16()
    coarse, fine = (quark_round("w8a8", {"m": {"weight": given}})["m"] for given in (weight, weight.float()))
    scale = coarse["weight_scale"]
    there(
        torch.equal(scale, scale.bfloat16().float()), "scales of bf16 weights", "none, but docs/quantization.md says so"
    )
    assert not torch.equal(fine["weight_scale"], fine["weight_scale"].bfloat16().float())


def test_transformers_is_not_declared() -> None:
    declared = [line for line in metadata.requires("amd-quark") or [] if "extra ==" not in line]
    names = {line.split()[0].split("<")[0].split(">")[0].split("=")[0] for line in declared}
    assert "numpy" in names
    there("transformers" not in names, "its dependencies", "pyproject.toml: quantize lists transformers")


@pytest.fixture(scope="module")
def small_model() -> Iterator[DeepseekV3ForCausalLM]:
    import_quark()
    config = DeepseekV3Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    # Quark compiles its rounding with torch, which takes longer than a small model's rounding itself.
    with torch.compiler.set_stance("force_eager"):
        yield DeepseekV3ForCausalLM(config).eval()


def test_experts_of_one_tensor_stay_as_they_are_unless_split_before(
    small_model: DeepseekV3ForCausalLM, tmp_path: Path
) -> None:
    """And, once split, the export's `exclude` lacks the gate."""
    from quark.torch import export_safetensors
    from quark.torch.utils.llm import preprocess_for_quantization

    workaround = "cluster/quantize/quark_in_memory.py"
    experts = "model.layers.1.mlp.experts"
    quantizer = quark_quantizer("w8a8")
    export_safetensors(quantizer.freeze(quantizer.quantize_model(small_model)), str(tmp_path / "fused"))
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    left = [name for name in fused if name.startswith(experts) and fused[name].dtype != torch.int8]
    there(bool(left), "experts kept in one tensor", f"{workaround}: preprocess_for_quantization")
    preprocess_for_quantization(small_model)
    quantizer = quark_quantizer("w8a8")
    export_safetensors(quantizer.freeze(quantizer.quantize_model(small_model)), str(tmp_path / "split"))
    split = load_file(tmp_path / "split" / "model.safetensors")
    assert split[f"{experts}.0.up_proj.weight"].dtype == torch.int8
    assert split["model.layers.1.mlp.gate.weight"].is_floating_point()
    config = json.loads((tmp_path / "split" / "config.json").read_text())["quantization_config"]
    assert "model.layers.1.self_attn.o_proj" in config["exclude"]
    there("model.layers.1.mlp.gate" not in config["exclude"], "the in-memory export's exclude", workaround)
