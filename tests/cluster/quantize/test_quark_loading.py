"""Exports of Quark's layouts, by Quark and by flyray's own rounding, are loaded by Quark, fit vLLM's rules, and mean
the same to flyray's model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_oracle import oracle_logits, published_tensors, random_model, relative, small_text
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm_rules import check_layout

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.single import SingleProcessModel
from flyray.cluster.quantize.matrix import dequantize
from flyray.cluster.quantize.quark_config import quark_config
from flyray.cluster.quantize.quark_quantizer import import_quark, quark_round
from flyray.cluster.quantize.recipe import Scheme
from flyray.cluster.quantize.rounding import quantize_matrix
from flyray.kernels.select import select_kernels, select_quantizer

TEXT = small_text(num_hidden_layers=2, n_routed_experts=4)
TOKENS = torch.randint(0, 97, (32,), generator=torch.Generator().manual_seed(3)).tolist()
SEED = 8
MADE = [
    ("w8a8", "quark"),
    ("w8a8-fp8", "quark"),
    ("w4a8-channel", "quark"),
    ("w8a8", "flyray"),
    ("w4a8-channel", "flyray"),
]
LINEARS = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj", "shared_experts.", "layers.0.mlp.")
"""What `w8a8-all` quantizes beside routed experts, by parts of names."""


@dataclass(frozen=True)
class Export:
    """parts: of every quantized module, by its name."""

    path: Path
    format: str
    parts: dict[str, dict[str, Tensor]]

    def weight(self, module: str) -> Tensor:
        """The weights [N, K] float32 that flyray takes them for."""
        return dequantize(self.format, self.parts[module])


def write_export(path: Path, format: str, by: str, linears: bool = False, prefix: str = "") -> Export:
    """A small model with its routed experts, and with `linears` also those of LINEARS, in one of Quark's layouts."""
    model = random_model(TEXT, SEED)
    tensors = published_tensors(model, lambda weight: {"weight": weight.bfloat16()})
    chosen = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and (".experts." in name or (linears and any(part in name for part in LINEARS)))
    ]
    source = {name: {"weight": tensors.pop(f"{name}.weight")} for name in chosen}
    parts = quark_round(format, source) if by == "quark" else _by_flyray(format, source)
    tensors |= {f"{name}.{part}": tensor for name in chosen for part, tensor in parts[name].items()}
    plain = [
        name for name, tensor in tensors.items() if name.endswith(".weight") and name.rpartition(".")[0] not in parts
    ]
    exclude = [prefix + name.removesuffix(".weight") for name in plain if "norm" not in name and "embed" not in name]
    path.mkdir()
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    config = {"text_config": TEXT, "model_type": "kimi_k25"} if prefix else {**TEXT, "model_type": "deepseek_v3"}
    config["quantization_config"] = quark_config(format, exclude)
    (path / "config.json").write_text(json.dumps(config))
    return Export(path, format, parts)


def _by_flyray(format: Any, source: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    scheme, quantizer = Scheme(format=format, clip="mse"), select_quantizer("reference", 1)
    return {name: quantize_matrix(scheme, "bf16", parts, None, quantizer, 64).parts for name, parts in source.items()}


@pytest.fixture(scope="module", autouse=True)
def eager() -> Iterator[None]:
    """Quark compiles its rounding with torch, which takes longer than a small model's rounding itself."""
    import_quark()
    with torch.compiler.set_stance("force_eager"):
        yield


def add_zero_points(export: Export) -> None:
    """What Quark 0.13's importer asks integer weights for, and its file-to-file export and the published checkpoints do
    not have. They are all 0; its in-memory export writes them."""
    tensors = load_file(export.path / "model.safetensors")
    for name, parts in export.parts.items():
        rows = len(parts["weight"])
        if export.format == "w8a8":
            tensors[f"{name}.weight_zero_point"] = torch.zeros(rows, dtype=torch.int8)
        if export.format == "w4a8-channel":
            tensors[f"{name}.weight_zero_point_2"] = torch.zeros(rows // 8, dtype=torch.int32)
    save_file(tensors, export.path / "model.safetensors")


def loaded_by_quark(path: Path) -> Any:
    from quark.torch import import_model_from_safetensors
    from quark.torch.utils.llm import preprocess_for_quantization

    model = random_model(TEXT, SEED + 1)  # other weights, so that none of them can be left over unnoticed
    preprocess_for_quantization(model)
    return import_model_from_safetensors(model, str(path)).eval()


@pytest.mark.parametrize(("format", "by"), MADE)
def test_quark_loads_the_weights_that_were_written(format: str, by: str, tmp_path: Path) -> None:
    export = write_export(tmp_path / "export", format, by)
    ours = SingleProcessModel.load(export.path, "auto", select_kernels("reference", 1), 64).prefill(TOKENS)
    add_zero_points(export)
    model = loaded_by_quark(export.path)
    for name in export.parts:
        linear = model.get_submodule(name)
        assert type(linear).__name__ == "QParamsLinear", name
        # int4_fp8: Quark multiplies by its two scales one after the other, flyray by their product.
        torch.testing.assert_close(linear._get_qweight(linear.weight), export.weight(name), rtol=3e-7, atol=0)
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert relative(ours, logits.float()) < 0.06  # activations are rounded differently, in w4a8-channel to FP8 by Quark
    assert relative(ours, oracle_logits(random_model(TEXT, SEED + 1), TOKENS)) > 0.5


@pytest.mark.parametrize("format", ["w8a8", "w4a8-channel"])
def test_quark_does_not_load_what_it_exports_itself(format: str, tmp_path: Path) -> None:
    """Neither its file-to-file exports of integers nor the published W4A8; so flyray need not write zero points."""
    export = write_export(tmp_path / "export", format, "quark")
    try:
        loaded_by_quark(export.path)
    except ValueError as error:
        if "zero_point" in str(error):
            return
        raise
    pytest.fail(
        f"Quark {metadata.version('amd-quark')} has mended the loading of its file-to-file exports: "
        "drop the workaround in tests/cluster/quantize/test_quark_loading.py (add_zero_points)"
    )


@pytest.mark.parametrize(("format", "by"), MADE)
def test_vllm_finds_what_it_expects(format: str, by: str, tmp_path: Path) -> None:
    check_layout(write_export(tmp_path / "export", format, by, prefix="language_model.").path)


def test_linears_in_int8_load_everywhere(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export", "w8a8", "flyray", linears=True)
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_a_proj"} <= export.parts.keys()
    check_layout(export.path)
    ours = SingleProcessModel.load(export.path, "auto", select_kernels("reference", 1), 64).prefill(TOKENS)
    add_zero_points(export)
    model = loaded_by_quark(export.path)
    for name in export.parts:
        linear = model.get_submodule(name)
        assert torch.equal(linear._get_qweight(linear.weight), export.weight(name)), name
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert relative(ours, logits.float()) < 0.05


def rewritten(export: Export, change: Callable[[dict[str, Tensor]], None], exclude: list[str], files: int = 1) -> Path:
    """The export with changed tensors, another `exclude`, and in several files."""
    tensors = load_file(export.path / "model.safetensors")
    change(tensors)
    path = export.path.with_name(f"{export.path.name}-rewritten")
    path.mkdir()
    names = sorted(tensors)
    for number in range(files):
        part = {name: tensors[name].contiguous() for name in names[number::files]}
        save_file(part, path / f"model-{number + 1:05}-of-{files:06}.safetensors")
    config = json.loads((export.path / "config.json").read_text())
    config["quantization_config"]["exclude"] = exclude or config["quantization_config"]["exclude"]
    (path / "config.json").write_text(json.dumps(config))
    return path


def scales_of_one_entry(tensors: dict[str, Tensor]) -> None:
    """As amd/Kimi-K2.5-W4A8 has them."""
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = tensors[name].reshape(1)


def bf16_scales(tensors: dict[str, Tensor]) -> None:
    """As Quark's in-memory export of ptpc_fp8 has them."""
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name] = tensors[name].bfloat16()


def zero_points(tensors: dict[str, Tensor]) -> None:
    """As Quark's in-memory export of INT8 has them."""
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        tensors[name.replace("_scale", "_zero_point")] = torch.zeros(len(tensors[name]), dtype=torch.int8)


PUBLISHED_EXCLUDE = ["lm_head", "re:.*self_attn.*", "re:.*mlp\\.gate$", "*shared_experts*", "*layers.0.mlp.*"]


@pytest.mark.parametrize(
    ("format", "change", "error"),
    [("w4a8-channel", scales_of_one_entry, 0), ("w8a8-fp8", bf16_scales, 0.03), ("w8a8", zero_points, 0)],
)
def test_published_styles_load(
    format: str, change: Callable[[dict[str, Tensor]], None], error: float, tmp_path: Path
) -> None:
    export = write_export(tmp_path / "export", format, "quark", prefix="language_model.")
    path = rewritten(export, change, PUBLISHED_EXCLUDE, files=3)
    kernels = select_kernels("reference", 1)
    plain, found = (SingleProcessModel.load(each, "auto", kernels, 64).prefill(TOKENS) for each in (export.path, path))
    assert relative(found, plain) <= error
    assert Checkpoint(path).expert_format() == format


def test_int8_linears_load_with_patterns_in_exclude(tmp_path: Path) -> None:
    export = write_export(tmp_path / "export", "w8a8", "flyray", linears=True, prefix="language_model.")
    path = rewritten(export, lambda _tensors: None, ["re:.*kv_b_proj", "*lm_head", "*mlp.gate"], files=2)
    kernels = select_kernels("reference", 1)
    plain, found = (SingleProcessModel.load(each, "auto", kernels, 64).prefill(TOKENS) for each in (export.path, path))
    assert torch.equal(found, plain)
