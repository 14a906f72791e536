"""KV pages in 8 bits in the engine: memory, and the same bits for any shards and chunks and from kept pages."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import TINY, write_tiny
from tiny_engine import Answer, answer, answers, greedy, run, tiny_config

from flyray.actors.engine_shape import EngineShape
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.request import EngineStatus
from flyray.cluster.engine import Engine, EngineClient
from flyray.kernels.kv_entries import EntryLayout
from flyray.kernels.select import select_kernels

pytestmark = pytest.mark.usefixtures("local_cluster")

LENGTHS = (3, 18, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_page_takes_as_many_bytes_as_its_entries(checkpoint: Path) -> None:
    entry = EntryLayout.of(TINY["kv_lora_rank"], TINY["qk_rope_head_dim"]).size
    page = TINY["num_hidden_layers"] * 8 * entry
    for kv_dtype in ("int8", "fp8"):
        config = tiny_config(checkpoint, kv_pages=0, kv_memory_bytes=9 * page + page // 2, kv_dtype=kv_dtype)
        shape = EngineShape.read(config)
        assert shape.kv_pages == 9
        assert any(f"rope key bf16, {page // 8:,} B a token" in line for line in shape.precision_plan)


async def twice(engine: Engine) -> tuple[dict[str, Answer], dict[str, Answer], EngineStatus]:
    """Requests one by one, the same ones at once afterwards, and then the engine's figures."""
    requests = [greedy(f"greedy {length}", length, score=False) for length in LENGTHS]
    async with EngineClient(engine.address, engine.keys) as client:
        alone = {request.request: await answer(client, request) for request in requests}
        return alone, await answers(client, requests), await client.status()


def test_answers_are_the_same_for_any_shards_and_chunks_and_from_kept_pages(checkpoint: Path) -> None:
    with Engine(tiny_config(checkpoint, kv_dtype="int8", prefix_cache=False)) as engine:
        expected, again, figures = run(twice(engine))
        assert figures.cached_tokens == 0
        assert again == expected
    with Engine(tiny_config(checkpoint, kv_dtype="int8", shards=2, max_batch_tokens=7)) as engine:
        assert any(" INT8, rope key bf16" in line for line in engine.precision_plan)
        alone, kept, figures = run(twice(engine))
        assert figures.cached_tokens > 0
        assert alone == kept == expected
    model = SingleProcessModel.load(checkpoint, "w4a8", select_kernels("cpu", 1, "int8"), 64)
    plain = SingleProcessModel.load(checkpoint, "w4a8", select_kernels("cpu", 1), 64)
    for length in LENGTHS:
        prompt = greedy("", length).prompt
        assert tuple(model.generate(prompt, 12)) == expected[f"greedy {length}"].tokens
        assert not bool((model.prefill(prompt) == plain.prefill(prompt)).all())
