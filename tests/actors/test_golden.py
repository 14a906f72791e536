"""What the golden prompt accepts, and what not."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoint import TINY, write_tiny

from flyray.actors.engine_config import EngineConfig
from flyray.actors.golden import (
    MEAN_BOUND,
    WORST_BOUND,
    GoldenPromptError,
    compare_scores,
    golden_prompt,
    parameter_count,
    reference_scores,
)
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.tensors import shard_tensors
from flyray.actors.weight_formats import WeightFormats


def test_scores_within_the_bounds_pass_with_their_distance() -> None:
    assert "0.01 from the reference kernels' on average, 0.02 at most" in compare_scores([-1.0, -2.0], [-1.0, -2.02])


@pytest.mark.parametrize("distance", [1.1 * MEAN_BOUND, float("nan"), float("inf")])
def test_scores_far_off_on_average_fail_with_the_numbers(distance: float) -> None:
    with pytest.raises(GoldenPromptError, match=f"allowed are {MEAN_BOUND} and {WORST_BOUND}"):
        compare_scores([-1.0] * 5, [-1.0 - distance] * 5)


def test_one_score_far_off_fails() -> None:
    ours = [-1.0] * 99
    with pytest.raises(GoldenPromptError, match=r"1\.6 at most"):
        compare_scores([*ours, -1.0], [*ours, -2.6])


def test_the_reference_has_the_weights_of_the_engine(tmp_path: Path) -> None:
    config = EngineConfig(str(write_tiny(tmp_path / "model")), precision="w4a8")
    model = ModelConfig.from_dict(TINY)
    others = [replace(config, int8_weights=("shared",)), replace(config, int4_weights=("shared",))]
    plain, eight, four = (reference_scores(each, model, 64) for each in (config, *others))
    assert plain != eight != four != plain


def test_prompts_differ_fit_and_stay_in_the_vocabulary() -> None:
    model = ModelConfig.from_dict(TINY)
    prompts = {golden_prompt(model, 512, variant) for variant in range(4)}
    assert len(prompts) == 4
    assert all(0 <= token < model.vocab_size for prompt in prompts for token in prompt)
    assert len(golden_prompt(model, 12)) == 4
    assert len(golden_prompt(model, 2)) == 1


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2, "first_k_dense_replace": 2}])
def test_parameters_are_those_of_the_tensors_without_norms(changes: dict) -> None:
    model = ModelConfig.from_dict(TINY | changes)
    tensors = shard_tensors(model, WeightFormats("bf16"), range(model.n_routed_experts))
    weights = [spec.shapes[0] for spec in tensors if spec.kind not in ("norms", "gate bias")]
    assert parameter_count(model) == sum(rows * columns for rows, columns in weights)
