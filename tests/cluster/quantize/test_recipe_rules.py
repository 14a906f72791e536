"""Recipes held against checkpoints: what each module becomes, and what is refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from byte_model import write_byte_model
from gathered import write_statistics
from hypothesis import given
from hypothesis import strategies as st
from quantized import recipe_of
from source_checkpoints import native_checkpoint
from tiny_checkpoint import write_tiny

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.statistics import StatisticsPlan
from flyray.cluster.quantize.matrix import QuantizeError
from flyray.cluster.quantize.memory import MemoryBudget, parse_memory
from flyray.cluster.quantize.plan import QuantizePlan, plan_quantization
from flyray.cluster.quantize.plan_inputs import QuantizeInputs
from flyray.cluster.quantize.recipe import Recipe, load_recipe, matches, shipped

EXPERTS = {"modules": ["model.layers.*.mlp.experts.*"], "format": "w8a8"}
MIXED = {"modules": ["*.experts.*"], "mixed": {"low": {"format": "w4a8-channel"}, "high": {"format": "w8a8"}}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Three layers, the first dense, with all of an attention block's linears."""
    return Checkpoint(write_tiny(tmp_path_factory.mktemp("tiny") / "model"))


def plan(tiny: Checkpoint, recipe: Recipe, inputs: QuantizeInputs | None = None) -> QuantizePlan:
    return plan_quantization(tiny, Path("/nowhere"), "label", recipe, inputs or QuantizeInputs())


def test_every_shipped_recipe_can_be_read_and_used(tiny: Checkpoint) -> None:
    assert {"w4a8", "w4a8-channel", "w8a8", "w8a8-fp8", "mixed", "w8a8-all"} <= set(shipped())
    for name in shipped():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.about
        if not recipe.needs_calibration and recipe.mixed is None:
            assert len(plan(tiny, recipe).matrices) >= 2 * 8 * 3


def test_the_first_rule_that_matches_decides_and_exclude_wins(tiny: Checkpoint) -> None:
    recipe = recipe_of(
        {"modules": ["model.layers.1.mlp.experts.*"], "format": "w4a8"},
        EXPERTS,
        {"modules": ["*.self_attn.o_proj", r"re:model\.layers\.0\.mlp\.(gate|up)_proj"], "format": "w8a8"},
        exclude=("model.layers.2.self_attn.o_proj",),
    )
    found = {matrix.name: matrix.scheme.format for matrix in plan(tiny, recipe).matrices}
    assert found["model.layers.1.mlp.experts.3.up_proj"] == "w4a8"
    assert found["model.layers.2.mlp.experts.3.up_proj"] == "w8a8"
    linears = {name for name in found if ".experts." not in name}
    attention = {f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)}
    assert linears == attention | {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*_layernorm", "model.layers.0.input_layernorm"),
        ("*.mlp.gate", "model.layers.1.mlp.gate"),
        ("model.embed_tokens", "model.embed_tokens"),
        ("lm_head", "lm_head"),
        ("*.kv_b_proj", "model.layers.0.self_attn.kv_b_proj"),
        ("*", ""),
    ],
)
def test_what_cannot_be_quantized_is_named(tiny: Checkpoint, pattern: str, name: str) -> None:
    recipe = recipe_of(EXPERTS, {"modules": [pattern], "format": "w8a8"})
    with pytest.raises(QuantizeError, match=rf"recipe mine: rules\[1\]: {name}.* cannot be quantized; routed experts"):
        plan(tiny, recipe)


@pytest.mark.parametrize("pattern", ["model.layers.7.*", "re:model.*experts", "experts"])
def test_a_pattern_that_matches_nothing_is_named(tiny: Checkpoint, pattern: str) -> None:
    for where, recipe in (
        (r"rules\[1\]\.modules", recipe_of(EXPERTS, {"modules": ["*.o_proj", pattern], "format": "w8a8"})),
        ("exclude", recipe_of(EXPERTS, exclude=(pattern,))),
    ):
        with pytest.raises(QuantizeError) as caught:
            plan(tiny, recipe)
        assert f"{pattern!r} matches no module of the checkpoint" in str(caught.value)
        assert where.replace("\\", "") in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "exclude"),
    [
        ([EXPERTS, {"modules": ["model.layers.1.mlp.experts.*"], "format": "w4a8"}], ()),
        (
            [{"modules": ["*.o_proj"], "format": "w8a8"}, {"modules": ["*.experts.*"], "format": "w4a8"}],
            ("*.experts.*",),
        ),
    ],
)
def test_a_rule_that_decides_nothing_is_named(
    tiny: Checkpoint, rules: list[dict[str, Any]], exclude: tuple[str, ...]
) -> None:
    with pytest.raises(QuantizeError, match=r"recipe mine: rules\[1\] decides nothing: earlier rules or exclude"):
        plan(tiny, recipe_of(*rules, exclude=exclude))


def test_a_mixed_rule_needs_experts(tiny: Checkpoint, tmp_path: Path) -> None:
    inputs = QuantizeInputs(sensitivity=tmp_path)
    with pytest.raises(QuantizeError, match="recipe mine: the mixed rule matches no routed expert"):
        plan(tiny, recipe_of(EXPERTS, MIXED | {"modules": ["*.o_proj"]}), inputs)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "w4a8", "clip": "mse"}, r"recipe mine: model\.layers\.1.*: w4a8 from a native .* so clip: mse has"),
        ({"format": "w4a8"}, ""),
    ],
)
def test_what_a_native_source_cannot_give_is_named_before_anything_runs(
    tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    native = Checkpoint(native_checkpoint(tmp_path / "native"))
    recipe = recipe_of({"modules": EXPERTS["modules"], **keys})
    if not message:
        assert plan(native, recipe).source_format == "w4a16"
        return
    with pytest.raises(QuantizeError, match=message):
        plan(native, recipe)


def test_formats_that_the_engine_cannot_run_together_are_refused(tiny: Checkpoint) -> None:
    fp8 = {"modules": ["*.experts.0.*"], "format": "w8a8-fp8", "by": "quark"}
    with pytest.raises(QuantizeError, match=r"experts\.0\.\w+ would need FP8 activations and .*experts\.\d\.\w+ INT8"):
        plan(tiny, recipe_of(fp8, EXPERTS))
    down = {"modules": ["*.experts.*.down_proj"], "format": "w4a8"}
    with pytest.raises(
        QuantizeError, match=r"gate_proj would be \w+ and .*; an expert's matrices share a format|share"
    ):
        plan(tiny, recipe_of(down, EXPERTS))
    with pytest.raises(QuantizeError, match=r"experts\.\d\.\w+ would need \w+ activations"):
        plan(tiny, recipe_of({"modules": ["*.layers.1.*.experts.0.*"], "format": "w8a8"}))
    with pytest.raises(QuantizeError, match=r"model\.layers\.0\.self_attn\.o_proj cannot be w4a8; .* can be w8a8"):
        plan(tiny, recipe_of({"modules": ["*.o_proj"], "format": "w4a8"}))
    quark = {"modules": ["*.experts.*"], "format": "w8a8", "by": "quark"}
    with pytest.raises(QuantizeError, match="recipe mine: smoothing needs by: flyray in every rule"):
        plan(tiny, recipe_of(quark, smoothing=0.5))
    mixed = {"low": {"format": "w4a8-channel"}, "high": {"format": "w8a8"}}
    with pytest.raises(QuantizeError, match="recipe mine needs --sensitivity"):
        plan(tiny, recipe_of({"modules": ["*.o_proj"], "mixed": mixed}))


@pytest.mark.parametrize(
    ("recipe", "inputs", "message"),
    [
        ("w4a8-channel-calibrated", QuantizeInputs(), "needs --calibration: run `flyray calibrate`"),
        ("w8a8", QuantizeInputs(calibration=Path("/tmp")), "recipe w8a8 does not use --calibration; leave it out"),
        ("mixed", QuantizeInputs(), "recipe mixed needs --sensitivity: run `flyray sensitivity`"),
        ("w4a8", QuantizeInputs(sensitivity=Path("/tmp")), "recipe w4a8 does not use --sensitivity; leave it out"),
        ("w4a8", QuantizeInputs(budget="50%"), "recipe w4a8 is not mixed and does not use --budget; leave it out"),
        ("mixed", QuantizeInputs(sensitivity=Path("/no/file")), "/no/file: the sensitivity is not there"),
    ],
)
def test_inputs_go_with_the_recipe(tiny: Checkpoint, recipe: str, inputs: QuantizeInputs, message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        plan(tiny, load_recipe(recipe), inputs)


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"rule": []}, "unknown key 'rule'"),
    ({"rules": []}, "'rules'"),
    ({"rules": [{**EXPERTS, "clipp": "mse"}]}, r"unknown key 'rules\[0\]\.clipp'"),
    ({"rules": [{**EXPERTS, "format": "int4"}]}, r"'rules\[0\]\.format'"),
    ({"rules": [{**EXPERTS, "by": "quark", "clip": "mse"}]}, "by: quark has neither clip nor error_feedback"),
    ({"rules": [{"modules": ["a"], "format": "w4a8", "by": "quark"}]}, "by: quark cannot make w4a8"),
    ({"rules": [{"modules": [], "format": "w8a8"}]}, r"'rules\[0\]\.modules'"),
    ({"version": 2}, "'version'"),
    ({"smoothing": 1.5}, "'smoothing'"),
    ({"name": "other"}, "unknown key 'name'; a recipe is called like its file"),
    ({"rules": [{**EXPERTS, "modules": ["re:("]}]}, r"'rules\[0\]\.modules': .*'re:\(' is no regular expression"),
    ({"exclude": ["re:*"]}, r"'exclude': .*'re:\*' is no regular expression: nothing to repeat"),
    ({"rules": [MIXED, MIXED]}, "only one rule can be mixed"),
]


@pytest.mark.parametrize(("change", "message"), KEYS)
def test_wrong_keys_of_a_file_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "rules": [EXPERTS]} | change))
    with pytest.raises(QuantizeError, match=message) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


schemes = st.sampled_from(
    [
        {"format": "w8a8", "by": "quark"},
        {"format": "w4a8", "clip": "mse"},
        {"format": "w4a8-channel", "clip": "energy", "error_feedback": True},
    ]
)
modules = st.from_regex(r"(model|\*)(\.[a-z0-9_*]{1,8}){0,4}", fullmatch=True)
rules = st.builds(
    lambda names, scheme: {"modules": names, **scheme}, st.lists(modules, min_size=1, max_size=3), schemes
)


@given(rules=st.lists(rules, min_size=1, max_size=4), exclude=st.lists(modules, max_size=2), name=modules)
def test_a_written_recipe_is_read_as_it_was_meant(
    rules: list[dict[str, Any]], exclude: list[str], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("recipe") / "mine.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "rules": rules, "exclude": exclude}))
    recipe = load_recipe(file)
    module = name.replace("*", "x")
    found = recipe.rule_for(module)
    if any(matches(pattern, module) for pattern in exclude):
        assert found is None
        return
    first = next((rule for rule in rules if any(matches(pattern, module) for pattern in rule["modules"])), None)
    assert (found is None) == (first is None)
    if found is not None and first is not None:
        assert found.scheme is not None
        stated = {"modules": list(found.modules), **found.scheme.model_dump(exclude_defaults=True)}
        assert stated == first


@pytest.mark.parametrize(
    ("text", "size"), [("4 GB", 4 * 10**9), ("512 MiB", 512 << 20), ("1.5GB", 15 * 10**8), ("128MiB", 128 << 20)]
)
def test_memory_is_a_size(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["4", "4 G", "-1 GB", "GB", "100 MB", "4 gbit", "1e9 B"])
def test_memory_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(QuantizeError, match=f"memory '{text}'"):
        parse_memory(text)


def test_a_matrix_that_does_not_fit_is_named_before_anything_runs(tiny: Checkpoint) -> None:
    small = MemoryBudget(parse_memory("128 MiB"), reserved=40 << 20)
    with pytest.raises(QuantizeError, match=r"experts\.\d\.\w+_proj: .* rows of 64 columns in \S+ need .* --memory"):
        small.check(plan(tiny, load_recipe("w4a8-channel")).matrices)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A native checkpoint, and statistics of it without second moments."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_byte_model(folder / "model")
    checkpoint = Checkpoint(folder / "model")
    config = ModelConfig.from_dict(checkpoint.config)
    statistics = StatisticsPlan.of(checkpoint, config, [range(config.n_routed_experts)], "w4a16", 0)
    return checkpoint, write_statistics(folder / "statistics", statistics, 20)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (recipe_of({**EXPERTS, "error_feedback": True}), r"statistics: error_feedback needs second moments, .*-block"),
        (
            recipe_of(EXPERTS, exclude=("model.layers.1.mlp.experts.*",), smoothing=0.5),
            r"model\.layers\.1\.mlp\.experts\.\d\.\w+: smoothing multiplies columns, which packed INT4 cannot take",
        ),
        (
            recipe_of({**EXPERTS, "format": "w4a8"}, smoothing=0.5),
            r"recipe mine: model\.layers\.1.*: w4a8 from a native .* so smoothing has nothing to change",
        ),
    ],
)
def test_what_a_calibration_cannot_drive_is_named_before_anything_runs(
    calibrated: tuple[Checkpoint, Path], recipe: Recipe, message: str
) -> None:
    checkpoint, statistics = calibrated
    with pytest.raises(QuantizeError, match=message):
        plan(checkpoint, recipe, QuantizeInputs(calibration=statistics))
    whole = recipe_of(EXPERTS, smoothing=0.5)
    assert plan(checkpoint, whole, QuantizeInputs(calibration=statistics)).matrices
