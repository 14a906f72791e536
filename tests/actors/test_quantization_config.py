"""What config.json may say of formats, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.quantization_config import format_experts, parse_experts, read_quantization
from flyray.actors.safetensors_header import CheckpointError

O_PROJ = "model.layers.3.self_attn.o_proj"


def flyray(**fields: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "flyray", **fields}}


def quark(exclude: Any, dtype: str = "int8", **fields: Any) -> dict[str, Any]:
    weight = {"dtype": dtype, "qscheme": "per_channel"}
    stated = {"quant_method": "quark", "global_quant_config": {"weight": weight}, "exclude": exclude, **fields}
    return {"quantization_config": stated}


@given(st.sets(st.integers(0, 500), min_size=1))
def test_expert_numbers_round_trip(experts: set[int]) -> None:
    text = format_experts(list(experts))
    assert parse_experts(text, "") == sorted(experts)
    assert len(text.split(",")) == sum(each - 1 not in experts for each in experts)


@given(st.text(alphabet="0123456789,- x٣", max_size=12) | st.none() | st.integers())
def test_other_texts_are_refused_or_are_numbers(text: object) -> None:
    runs = r" *\d{1,6}(-\d{1,6})? *"
    if isinstance(text, str) and re.fullmatch(f"{runs}(,{runs})*", text, re.ASCII) and not backwards(text):
        assert parse_experts(text, "here")
    else:
        with pytest.raises(CheckpointError, match=r"here is .* expert numbers such as"):
            parse_experts(text, "here")


def backwards(text: str) -> bool:
    ends = [part.split("-") for part in text.split(",")]
    return any(int(end[0]) > int(end[-1]) for end in ends)


def test_numbers_as_written() -> None:
    assert parse_experts("0-5,12", "") == [0, 1, 2, 3, 4, 5, 12]
    assert parse_experts(" 3 , 7-7", "") == [3, 7]
    for bad in ("", "5-3", "1,,2", "-1", "1-2-3", "a"):
        with pytest.raises(CheckpointError, match="expert numbers such as"):
            parse_experts(bad, "here")


def test_version_2_says_each_expert_and_linear() -> None:
    experts = {"1": {"w8a8": "0-1", "w4a8": "2"}}
    stated = read_quantization(
        flyray(version=2, format="mixed", experts=experts, linears={"w8a8": [f"p.{O_PROJ}"]}, exclude=["p.lm_head"])
    )
    assert [stated.matrix(1, expert, "any") for expert in range(4)] == ["w8a8", "w8a8", "w4a8", None]
    assert stated.matrix(2, 0, "any") is None
    assert stated.linear(O_PROJ, f"p.{O_PROJ}") == "w8a8"
    assert stated.linear("lm_head", "p.lm_head") == "bf16"
    assert stated.linear("other") == "bf16"


@pytest.mark.parametrize(
    "exclude",
    [
        [f"language_model.{O_PROJ}"],
        [O_PROJ],
        ["lm_head", "*self_attn*"],
        [r"re:.*self_attn.*"],
        [r"re:language_model\.model\.layers\.\d+\.self_attn\.o"],
        ["model.layers.[0-9].self_attn.?_proj"],
    ],
)
def test_what_quark_excludes_in_its_published_forms(exclude: list[str]) -> None:
    stated = read_quantization(quark(exclude))
    assert stated.linear(O_PROJ, f"language_model.{O_PROJ}") == "bf16"
    other = O_PROJ.replace("self_attn.o_proj", "mlp.shared_experts.up_proj")
    assert stated.linear(other, f"language_model.{other}") == "w8a8"
    assert stated.matrix(1, 2, "model.layers.1.mlp.experts.2.up_proj") == "w8a8"


@pytest.mark.parametrize("exclude", [["o_proj"], ["model.layers.3.self_attn"], ["re:o_proj"], ["self_attn*"], None, []])
def test_what_does_not_exclude_it(exclude: list[str] | None) -> None:
    assert read_quantization(quark(exclude)).linear(O_PROJ) == "w8a8"
    assert read_quantization(quark(exclude, "fp8_e4m3")).linear(O_PROJ) == "w8a8-fp8"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (flyray(version=3, format="w4a8"), r"version is 3, this flyray reads \(1, 2\)"),
        (flyray(version=1, format="mixed"), "format is 'mixed', not one of"),
        (flyray(format="w4a8", linears={"w8a8": []}), "linears needs version 2"),
        (flyray(version=2, format="w4a8", experts={"1": {"w4a8": "0"}}), "experts is for format 'mixed' alone"),
        (flyray(version=2, format="mixed"), "experts is None; format 'mixed' needs"),
        (flyray(version=2, format="mixed", experts={"1": {"w2": "0"}}), r"experts\.1: 'w2' is not one of"),
        (flyray(version=2, format="mixed", experts={"one": {"w4a8": "0"}}), r"experts\.one: expected"),
        (flyray(version=2, format="mixed", experts={"1": {"w4a8": "0-2", "w8a8": "2"}}), "names expert 2 twice"),
        (flyray(version=2, format="mixed", experts={"1": {"w4a8": 3}}), r"experts\.1\.w4a8 is 3; expert numbers"),
        (flyray(version=2, format="w8a8", linears={"w8a8-fp8": ["a"]}), "linears is .*only"),
        (flyray(version=2, format="w8a8", linears={"w8a8": "a"}), r"linears\.w8a8 is 'a'; a list"),
        (quark("lm_head"), "exclude is 'lm_head'; a list of module names"),
        (quark(["re:("]), r"exclude: 're:\(' is no regular expression"),
        (quark([], layer_quant_config={"*experts*": {}}), "layer_quant_config is not empty"),
        (quark([], "fp4"), "global_quant_config.weight is"),
    ],
)
def test_what_cannot_be_read_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"quantization_config.*{message}"):
        read_quantization(config)
