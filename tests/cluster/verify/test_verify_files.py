"""What damages a checkpoint is noticed, with its tensor or file named; what does not is let through."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from verified import UP, change, flip_bit, put, verify, write_as, write_native, write_sums

from flyray.actors.checkpoint import Checkpoint
from flyray.cluster.quantize.command import quantize
from flyray.cluster.quantize.recipe import load_recipe
from flyray.cluster.verify.limits import Limits
from flyray.cluster.verify.target import AUTO, VerifyError, parse_target
from flyray.cluster.verify.weights import compare_weights, relative_error

DOWN = UP.replace("up_proj", "down_proj")
OTHER = UP.replace("experts.5", "experts.2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """native, and what it was quantized to, by format."""
    folder = tmp_path_factory.mktemp("made")
    model = write_native(folder / "native")
    paths = {form: write_as(folder / form, model, folder / "native", form) for form in ("w4a8", "w8a8", "w4a8-channel")}
    for path in paths.values():
        write_sums(path)
    return {"native": folder / "native", **paths}


@pytest.fixture
def pair(made: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The native checkpoint and a copy of the 8-bit one, to be damaged. The copy has no SHA256SUMS."""
    shutil.copytree(made["w8a8"], tmp_path / "b")
    (tmp_path / "b" / "SHA256SUMS").unlink()
    return made["native"], tmp_path / "b"


def failures(report: str) -> list[str]:
    return [line for line in report.splitlines() if line.startswith("FAIL")]


def test_a_good_pair_passes(made: dict[str, Path]) -> None:
    code, report = verify(made["native"], made["w8a8"])
    assert (code, failures(report)) == (0, [])
    for words in (
        "A checksums: there is no SHA256SUMS",
        "B checksums: all files are as in SHA256SUMS",
        "tokenizers: A and B give the same ",
        "copied tensors: 43 are the same to the bit",
        "expert matrices: weight error: 48 compared, error 0.",
        "(limit: at most 0.02)",
    ):
        assert words in report


def test_every_format_against_itself_has_no_error(made: dict[str, Path]) -> None:
    for path in made.values():
        code, report = verify(path, path, Limits(max_weight_error=0.0, max_row_error=0.0))
        assert (code, failures(report)) == (0, [])


BLEND = """version: 1
rules:
  - {modules: ["model.layers.1.mlp.experts.*"], format: w8a8, clip: mse}
  - {modules: ["model.layers.2.mlp.experts.*"], format: w4a8}
  - {modules: ["*.self_attn.o_proj", "*.mlp.shared_experts.*"], format: w8a8}
"""


def test_several_formats_and_linears_in_one_checkpoint(made: dict[str, Path], tmp_path: Path) -> None:
    """What `flyray quantize` writes passes; its own errors of both formats and of the linears are found again."""
    (tmp_path / "blend.yaml").write_text(BLEND)
    report = quantize(made["native"], tmp_path / "blend", load_recipe(tmp_path / "blend.yaml"), progress=False)
    code, text = verify(made["native"], tmp_path / "blend", Limits(max_weight_error=0.03, max_row_error=0.1))
    assert (code, failures(text)) == (0, [])
    assert "B checksums: all files are as in SHA256SUMS" in text
    assert "copied tensors: 34 are the same to the bit" in text
    assert "quantized linears: weight error: 9 compared" in text
    compared = compare_weights(Checkpoint(made["native"]), Checkpoint(tmp_path / "blend"), lambda name: None)
    error = relative_error([*compared.experts, *compared.linears])
    assert error == pytest.approx(report.weight_error, rel=1e-4)
    linear = "model.layers.1.self_attn.o_proj"

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{linear}.weight_scale"][5] *= 0.5

    change(tmp_path / "blend", f"{linear}.weight_scale", halve)
    code, text = verify(made["native"], tmp_path / "blend", Limits(max_row_error=0.1))
    assert code == 1
    assert f"in row 5 of {linear}.weight, which is 0.50" in failures(text)[1]


def test_four_bits_are_beyond_the_limits_of_eight(made: dict[str, Path]) -> None:
    code, report = verify(made["native"], made["w4a8-channel"])
    assert code == 1
    assert len(failures(report)) == 2
    assert "48 beyond the limit" in report
    code, report = verify(made["native"], made["w4a8-channel"], Limits(max_weight_error=0.3))
    assert code == 0
    code, report = verify(made["native"], made["w4a8-channel"], Limits())
    assert code == 0
    assert "-     expert matrices: worst row" in report


def test_a_flipped_bit_in_a_scale_is_in_its_file_and_in_its_row(made: dict[str, Path], tmp_path: Path) -> None:
    b = tmp_path / "b"
    shutil.copytree(made["w8a8"], b)
    entry = Checkpoint(b).entry(f"{UP}.weight_scale")
    flip_bit(entry.file, entry.begin + 4 * 17 + 2, 7)  # the lowest bit of row 17's exponent
    code, report = verify(b)
    assert code == 1
    assert failures(report) == [f"FAIL  A checksums: not as in SHA256SUMS: {entry.file.name}"]
    code, report = verify(made["native"], b)
    assert code == 1
    assert f"in row 17 of {UP}, which is " in report


def test_sums_notice_any_bit_of_any_file(made: dict[str, Path], tmp_path: Path) -> None:
    for file in ("tokenizer_config.json", "config.json", "model-00001-of-000002.safetensors"):
        b = tmp_path / file
        shutil.copytree(made["w4a8"], b)
        flip_bit(b / file, (b / file).stat().st_size - 1, 0)
        _, report = verify(b)
        assert f"FAIL  A checksums: not as in SHA256SUMS: {file}" in report


def test_sums_of_sha256sum_itself(pair: tuple[Path, Path]) -> None:
    _, b = pair
    names = sorted(file.name for file in b.iterdir())
    done = subprocess.run(["sha256sum", *names], cwd=b, capture_output=True, text=True, check=True)
    (b / "SHA256SUMS").write_text(done.stdout)
    assert "ok    A checksums: all files are as in SHA256SUMS" in verify(b)[1]
    (b / names[1]).write_bytes((b / names[1]).read_bytes() + b" ")
    (b / "SHA256SUMS").write_text(done.stdout.replace(f"  {names[0]}", f" *{names[0]}"))
    assert f"FAIL  A checksums: not as in SHA256SUMS: {names[1]}" in verify(b)[1]
    (b / "SHA256SUMS").write_text(done.stdout + "nonsense\n")
    assert f"not as in SHA256SUMS: SHA256SUMS, {names[1]}" in verify(b)[1]


def test_swapped_experts_are_named(pair: tuple[Path, Path]) -> None:
    native, b = pair
    put(b, f"{OTHER}.weight", Checkpoint(b).read(f"{UP}.weight"))
    code, report = verify(native, b)
    assert code == 1
    [weights, row] = failures(report)
    worst = float(weights.partition("worst ")[2].partition("%")[0])
    assert 120 < worst < 160  # unrelated weights of one size: the square root of 2
    assert f"({OTHER})" in weights
    assert OTHER in row


def test_a_row_scale_that_is_twice_too_large(pair: tuple[Path, Path]) -> None:
    native, b = pair

    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight_scale"][40] *= 2

    change(b, f"{UP}.weight_scale", double)
    code, report = verify(native, b)
    assert code == 1
    assert f"in row 40 of {UP}, which is 2.00" in failures(report)[1]
    assert f"({UP})" in failures(report)[0]


def test_powers_of_two_that_cancel_are_no_error(pair: tuple[Path, Path]) -> None:
    """What smoothing does: the layer's input and an expert's inner activations divided, their readers multiplied."""
    native, b = pair
    generator = torch.Generator().manual_seed(3)
    factor = torch.randint(-2, 3, (64,), generator=generator).float().exp2()
    inner = torch.randint(-2, 3, (64,), generator=generator).float().exp2()
    at = "model.layers.1"
    readers = [f"{at}.mlp.gate", f"{at}.mlp.shared_experts.gate_proj", f"{at}.mlp.shared_experts.up_proj"]

    def scale_columns(name: str, factor: torch.Tensor) -> None:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

        change(b, name, edit)

    def smooth(name: str, rows: torch.Tensor, factor: torch.Tensor) -> None:
        weight = Checkpoint(b)
        values = weight.read(f"{name}.weight").float() * weight.read(f"{name}.weight_scale").unsqueeze(1)
        values = values * factor * rows.unsqueeze(1)
        scale = values.abs().amax(1) / 127
        put(b, f"{name}.weight", (values / scale.unsqueeze(1)).round().to(torch.int8))
        put(b, f"{name}.weight_scale", scale)

    scale_columns(f"{at}.post_attention_layernorm.weight", 1 / factor)
    for name in readers:
        scale_columns(f"{name}.weight", factor)
    ones = torch.ones(64)
    for expert in range(8):
        for kind, rows, each in (("gate", ones, factor), ("up", 1 / inner, factor), ("down", ones, inner)):
            smooth(f"{at}.mlp.experts.{expert}.{kind}_proj", rows, each)
    code, report = verify(native, b, Limits(max_weight_error=0.05, max_row_error=0.15))
    assert (code, failures(report)) == (0, [])
    assert "39 are the same to the bit, 4 are A's times powers of two (smoothing)" in report

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight_scale"][9] *= 4  # without the columns of down_proj

    change(b, f"{UP}.weight_scale", spoil)
    code, report = verify(native, b, Limits(max_weight_error=0.05, max_row_error=0.15))
    assert code == 1
    assert f"in row 9 of {UP}, which is" in failures(report)[1]


def test_copied_tensors_that_differ(pair: tuple[Path, Path]) -> None:
    native, b = pair
    name = "model.layers.0.self_attn.o_proj.weight"

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 4] *= 1.5

    change(b, name, nudge)
    code, report = verify(native, b)
    assert code == 1
    assert "42 are the same to the bit, 1 differ: model.layers.0.self_attn.o_proj.weight (" in failures(report)[0]
    code, report = verify(native, b, Limits())
    assert code == 0
    assert "-     copied tensors: 42 are the same to the bit, 1 differ" in report


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_values_that_no_weight_has(pair: tuple[Path, Path], value: float) -> None:
    _, b = pair

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{DOWN}.weight_scale"][7] = value

    change(b, f"{DOWN}.weight_scale", spoil)
    code, report = verify(b)
    assert code == 1
    words = "a negative scale" if value < 0 else "not finite in row 7"
    assert failures(report) == [f"FAIL  A values: {DOWN}.weight_scale ({words})"]


def test_a_truncated_file_is_named(pair: tuple[Path, Path]) -> None:
    native, b = pair
    file = b / "model-00002-of-000002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, report = verify(native, b)
    assert code == 1
    assert len(failures(report)) == 1
    assert failures(report)[0].startswith(f"FAIL  B files: {file}: truncated: tensor ")


def test_a_missing_tensor_and_metadata_that_lie(pair: tuple[Path, Path]) -> None:
    _, b = pair
    change(b, f"{DOWN}.weight", lambda tensors: tensors.update(gone=tensors.pop(f"{DOWN}.weight")))
    code, report = verify(b)
    assert code == 1
    assert DOWN in failures(report)[0]
    config = json.loads((b / "config.json").read_text())
    del config["quantization_config"]
    (b / "config.json").write_text(json.dumps(config))
    assert verify(b)[0] == 1


def test_a_tensor_of_another_part_of_the_model_that_is_gone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    native, b = pair
    a = tmp_path / "a"
    shutil.copytree(native, a)
    name = "model.norm.weight"
    change(a, name, lambda tensors: tensors.update({"vision_tower.proj.weight": torch.ones(3, 3)}))
    code, report = verify(a, b)
    assert code == 1
    assert failures(report) == ["FAIL  tensors of both: B lacks vision_tower.proj.weight"]
    code, report = verify(b, a, Limits())
    assert code == 0
    assert "B has all that A has; only B has vision_tower.proj.weight" in report


def test_a_mixed_up_tokenizer(pair: tuple[Path, Path]) -> None:
    native, b = pair
    lines = (b / "tiktoken.model").read_text().splitlines()
    swapped = [f"{lines[66].split()[0]} 65", f"{lines[65].split()[0]} 66"]
    (b / "tiktoken.model").write_text("\n".join([*lines[:65], *swapped, *lines[67:]]))
    settings = json.loads((b / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["256"]["content"] = "[OTHER]"
    (b / "tokenizer_config.json").write_text(json.dumps(settings))
    code, report = verify(native, b)
    assert code == 1
    assert "FAIL  tokenizers: A and B differ in tiktoken.model and tokenizer_config.json ([" in report
    assert "[OTHER]" in report


def test_a_vocabulary_that_is_not_the_models(pair: tuple[Path, Path]) -> None:
    _, b = pair
    settings = json.loads((b / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["300"] = {"content": "<new>"}
    (b / "tokenizer_config.json").write_text(json.dumps(settings))
    code, report = verify(b)
    assert code == 1
    assert "FAIL  A tokenizer: tiktoken.model has ids up to 300, the model's vocab_size is 288" in report
    (b / "tiktoken.model").unlink()
    assert "tiktoken.model: cannot read the tokenizer's vocabulary" in failures(verify(b)[1])[0]


def test_two_architectures_are_not_compared(pair: tuple[Path, Path]) -> None:
    native, b = pair
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 3.0}))
    code, report = verify(native, b)
    assert code == 1
    assert "FAIL  architecture: A and B differ in routed_scaling_factor (2.5 and 3.0)" in report


def test_targets_are_folders_with_or_without_a_precision(tmp_path: Path) -> None:
    (tmp_path / "x:w8a8").mkdir()
    (tmp_path / "x").mkdir()
    assert parse_target("A", f"{tmp_path}/x").precision == AUTO
    assert parse_target("A", f"{tmp_path}/x:bf16").precision == "bf16"
    assert parse_target("A", f"{tmp_path}/x:w8a8").path.name == "x:w8a8"
    with pytest.raises(VerifyError, match="precision 'w9' is unknown; auto or one of bf16"):
        parse_target("A", f"{tmp_path}/x:w9")
    with pytest.raises(VerifyError, match="no such checkpoint folder"):
        parse_target("A", f"{tmp_path}/y")


def test_limits_that_nothing_would_be_held_against_are_refused(made: dict[str, Path]) -> None:
    with pytest.raises(VerifyError, match="--max-kl: needs the engine"):
        verify(made["native"], made["w8a8"], Limits(max_kl=0.1))
    from flyray.cluster.verify import command

    with pytest.raises(VerifyError, match="--max-row-error: a limit compares two checkpoints"):
        command.run(str(made["native"]), limits=Limits(max_row_error=0.1), text_file="x", tasks_file="x")
