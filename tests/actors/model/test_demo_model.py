"""The demo model's real weights through `SingleProcessModel`: every precision a native checkpoint loads in answers."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import tiktoken

from flyray.actors.checkpoint import Checkpoint
from flyray.actors.model.config import ModelConfig
from flyray.actors.model.prompt_attention import least_expanded_rows
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.precision import precision_plan
from flyray.actors.weights import load_shard
from flyray.kernels.select import select_kernels

DEMO = Path(__file__).parents[3] / "cluster" / "demo" / "kimi-k2.5-nano"
TURN = (
    "<|im_user|>user<|im_middle|>What is {} + {}?<|im_end|>"
    "<|im_assistant|>assistant<|im_middle|><think></think>{}<|im_end|>"
)
QUESTION = "<|im_user|>user<|im_middle|>What is 12 + 30?<|im_end|><|im_assistant|>assistant<|im_middle|><think>"


def encoding() -> tiktoken.Encoding:
    """Written out here, so that this test needs nothing from the floor above."""
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    lines = (line.split() for line in (DEMO / "tiktoken.model").read_bytes().splitlines() if line)
    return tiktoken.Encoding(
        "demo",
        pat_str=config["pat_str"],
        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in lines},
        special_tokens={entry["content"]: int(id) for id, entry in config["added_tokens_decoder"].items()},
    )


@pytest.mark.parametrize("precision", ["auto", "w4a8", "w8a8"])
def test_demo_model_adds(precision: str) -> None:
    text = encoding()
    prompt = text.encode(QUESTION, allowed_special="all")
    end = text.encode("<|im_end|>", allowed_special="all")
    model = SingleProcessModel.load(DEMO, precision, select_kernels("cpu", 1), 256)
    answer = text.decode(model.generate(prompt, 120, end))
    assert answer.partition("</think>")[2].strip().rstrip(".").endswith("42"), answer


def test_long_prompts_with_expanded_attention_have_the_same_answer() -> None:
    """By the reference, against the CPU's absorbed attention."""
    text, kernels = encoding(), select_kernels("reference", 1)
    turns = "".join(TURN.format(a, b, a + b) for a, b in ((12, 30), (45, 17), (101, 22), (64, 64), (7, 8), (55, 21)))
    prompt = text.encode(turns + QUESTION, allowed_special="all")
    absorbed = SingleProcessModel.load(DEMO, "w8a8", select_kernels("cpu", 1), 256)
    weights = load_shard(Checkpoint(DEMO), absorbed.config, "w8a8", range(absorbed.config.n_routed_experts), kernels)
    expanded = SingleProcessModel(absorbed.config, weights, kernels, 256, prompt_attention="expanded")
    assert len(prompt) >= least_expanded_rows(absorbed.config)
    answer = expanded.generate(prompt, 12)
    assert text.decode(answer).startswith("2 1 and 0 3\n2+0")
    assert answer == absorbed.generate(prompt, 12)


def test_demo_model_has_a_plan() -> None:
    checkpoint = Checkpoint(DEMO)
    plan = precision_plan(ModelConfig.from_dict(checkpoint.config), checkpoint, "w4a8", select_kernels("cpu", 1))
    assert (plan.disk, plan.memory) == ("w4a16", "w4a8")
    assert {row.kernel.split(".")[0] for row in plan.rows} == {"cpu"}
