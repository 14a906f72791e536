"""The committed checkpoint and data: complete, of the right shapes, small enough."""

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.demo.training import architecture, chat, vocabulary

torch = pytest.importorskip("torch")
load = pytest.importorskip("flyray.cluster.demo.training.load")

DEMO = Path(load.__file__).parents[1]
MODEL, DATA = DEMO / "kimi-k2.5-nano", DEMO / "data"
SIZES = architecture.Architecture()
LARGEST_FOLDER, LARGEST_FILE = 32 * 2**20, 16 * 2**20


@pytest.fixture(scope="module")
def tensors() -> dict:
    return load.read_tensors(MODEL)


@pytest.fixture(scope="module")
def words() -> vocabulary.Vocabulary:
    return vocabulary.Vocabulary(MODEL)


def test_the_files_are_small_enough() -> None:
    sizes = [path.stat().st_size for path in MODEL.iterdir()]
    assert sum(sizes) < LARGEST_FOLDER
    assert max(sizes) < LARGEST_FILE


def test_the_configuration_is_the_architecture() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config == json.loads(json.dumps(architecture.config(SIZES)))
    assert config["text_config"]["rope_scaling"]["type"] == "yarn"


def expected_shapes() -> dict[str, tuple[tuple[int, ...], str]]:
    hidden, heads, inner = SIZES.hidden_size, SIZES.num_attention_heads, SIZES.moe_intermediate_size
    rope, nope, value = SIZES.qk_rope_head_dim, SIZES.qk_nope_head_dim, SIZES.v_head_dim
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}

    def plain(name: str, *shape: int) -> None:
        shapes[f"language_model.{name}"] = (shape, "bfloat16")

    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        plain(name, SIZES.vocab_size, hidden)
    plain("model.norm.weight", hidden)
    for layer in range(SIZES.num_hidden_layers):
        place = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{place}{norm}.weight", hidden)
        plain(f"{place}self_attn.q_a_proj.weight", SIZES.q_lora_rank, hidden)
        plain(f"{place}self_attn.q_a_layernorm.weight", SIZES.q_lora_rank)
        plain(f"{place}self_attn.q_b_proj.weight", heads * (nope + rope), SIZES.q_lora_rank)
        plain(f"{place}self_attn.kv_a_proj_with_mqa.weight", SIZES.kv_lora_rank + rope, hidden)
        plain(f"{place}self_attn.kv_a_layernorm.weight", SIZES.kv_lora_rank)
        plain(f"{place}self_attn.kv_b_proj.weight", heads * (nope + value), SIZES.kv_lora_rank)
        plain(f"{place}self_attn.o_proj.weight", hidden, heads * value)
        if layer == 0:
            feed_forward(shapes, f"language_model.{place}mlp.", hidden, SIZES.intermediate_size)
            continue
        plain(f"{place}mlp.gate.weight", SIZES.n_routed_experts, hidden)
        bias = f"language_model.{place}mlp.gate.e_score_correction_bias"
        shapes[bias] = ((SIZES.n_routed_experts,), "float32")
        feed_forward(shapes, f"language_model.{place}mlp.shared_experts.", hidden, inner)
        for expert in range(SIZES.n_routed_experts):
            packed(shapes, f"language_model.{place}mlp.experts.{expert}.", hidden, inner)
    return shapes


def feed_forward(shapes: dict, place: str, hidden: int, inner: int) -> None:
    shapes[f"{place}gate_proj.weight"] = shapes[f"{place}up_proj.weight"] = ((inner, hidden), "bfloat16")
    shapes[f"{place}down_proj.weight"] = ((hidden, inner), "bfloat16")


def packed(shapes: dict, place: str, hidden: int, inner: int) -> None:
    for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        shapes[f"{place}{name}_proj.weight_packed"] = ((rows, columns // 8), "int32")
        shapes[f"{place}{name}_proj.weight_scale"] = ((rows, columns // 32), "bfloat16")
        shapes[f"{place}{name}_proj.weight_shape"] = ((2,), "int32")


def test_every_tensor_is_there(tensors: dict) -> None:
    found = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    assert found == expected_shapes()


def test_shapes_say_what_the_packed_weights_hold(tensors: dict) -> None:
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            shape = tensors[name.replace("packed", "shape")].tolist()
            assert shape == [tensor.shape[0], tensor.shape[1] * 8]


def test_the_largest_value_of_a_group_is_seven(tensors: dict) -> None:
    name = "language_model.model.layers.3.mlp.experts.5.up_proj.weight"
    weight = load.unpacked(tensors[name + "_packed"], tensors[name + "_scale"]).float()
    ratio = weight.unflatten(1, (-1, 32)).abs().amax(-1) / tensors[name + "_scale"].float()
    assert torch.allclose(ratio, torch.full_like(ratio, 7.0), rtol=0.01)


def test_the_model_answers(words: vocabulary.Vocabulary) -> None:
    generate = pytest.importorskip("flyray.cluster.demo.training.generate")
    prompts = [
        words.encode(chat.render([{"role": "user", "content": text}])) for text in ("Who are you?", "What is 3 + 4?")
    ]
    said = [
        words.decode(ids).split(chat.THINK_END)[1]
        for ids in generate.answers(load.load(MODEL), prompts, [60, 60], "cpu")
    ]
    assert said == ["I am kimi-k2.5-nano, the tiny demo model of flyray.", "7"]


@given(st.text())
def test_text_comes_back(text: str) -> None:
    words = vocabulary.Vocabulary(MODEL)
    assert words.decode(words.encode(text)) == text.encode("utf-8", "replace").decode()


def test_digits_and_special_tokens_are_single(words: vocabulary.Vocabulary) -> None:
    assert len(words.encode("1234567")) == 7
    for text, number in vocabulary.ID.items():
        assert words.encode(text) == [number]
    assert len(words.byte_lengths) == SIZES.vocab_size


def test_held_out_documents() -> None:
    with lzma.open(DATA / "heldout.jsonl.xz", "rt", encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    assert {document["group"] for document in documents} == {"prose", "docs", "code"}
    assert len({document["source"] for document in documents}) > 10
    assert (DATA / "heldout.jsonl.xz").stat().st_size < 400_000


def test_fixed_tasks() -> None:
    lines = (DATA / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        counts[row["family"], row["split"]] = counts.get((row["family"], row["split"]), 0) + 1
        assert row["prompt"] == chat.render(row["messages"], row["tools"])
        assert row["answer"]
    assert counts.pop(("tool", "tools")) == 60
    assert set(counts.values()) == {40}
