from __future__ import annotations

import pytest
import torch
from kernel_cases import normal
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from flyray.kernels.protocol import GateConfig, Kernels


@pytest.mark.parametrize(("experts", "groups", "chosen", "top_k"), [(24, 1, 1, 4), (32, 4, 2, 6), (256, 8, 4, 8)])
@pytest.mark.parametrize("norm", [True, False])
def test_chooses_as_deepseek_v3(
    kernels: Kernels, experts: int, groups: int, chosen: int, top_k: int, norm: bool
) -> None:
    config = DeepseekV3Config(
        hidden_size=48,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=chosen,
        norm_topk_prob=norm,
        routed_scaling_factor=2.446,
    )
    router = DeepseekV3TopkRouter(config)
    weight, bias, x = normal(1, experts, 48) * 0.2, normal(2, experts) * 0.1, normal(3, 40, 48)
    with torch.no_grad():
        router.weight.copy_(weight)
        router.e_score_correction_bias.copy_(bias)
        _, expected_weights, expected_ids = router(x)
    ids, weights = kernels.gate(x, weight, bias, GateConfig(top_k, groups, chosen, norm, 2.446))
    assert ids.dtype == torch.int32
    order, expected_order = ids.long().argsort(1), expected_ids.argsort(1)
    assert torch.equal(ids.long().gather(1, order), expected_ids.gather(1, expected_order))
    expected = expected_weights.gather(1, expected_order)
    assert torch.allclose(weights.gather(1, order), expected, rtol=1e-5, atol=0)


def test_best_first_and_ties_to_the_lower_id(kernels: Kernels) -> None:
    x, weight = torch.zeros(1, 4), torch.zeros(6, 4)
    bias = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    ids, weights = kernels.gate(x, weight, bias, GateConfig(4, 1, 1, True, 2.0))
    assert ids.tolist() == [[1, 3, 2, 4]]
    assert weights.tolist() == [[0.5] * 4]


def test_tied_groups_go_to_the_lower_group(kernels: Kernels) -> None:
    bias = torch.tensor([0.0, 3.0, 2.0, 1.0, 1.0, 2.0, 1.5, 1.5])
    ids, _ = kernels.gate(torch.zeros(1, 4), torch.zeros(8, 4), bias, GateConfig(3, 4, 2, False, 1.0))
    assert ids.tolist() == [[1, 2, 3]]


def test_a_nan_expert_is_chosen_last(kernels: Kernels) -> None:
    weight = torch.zeros(4, 2)
    weight[1] = torch.nan
    ids, weights = kernels.gate(torch.ones(1, 2), weight, torch.zeros(4), GateConfig(3, 1, 1, False, 1.0))
    assert ids.tolist() == [[0, 2, 3]]
    assert weights.tolist() == [[0.5] * 3]


def test_bias_only_chooses(kernels: Kernels) -> None:
    bias = torch.tensor([100.0, 0.0, -100.0])
    ids, weights = kernels.gate(torch.zeros(1, 2), torch.zeros(3, 2), bias, GateConfig(2, 1, 1, True, 1.0))
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [[0.5, 0.5]]
