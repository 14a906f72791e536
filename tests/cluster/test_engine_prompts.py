"""An engine whose long prompts attend with expanded keys and values, which must give the texts of absorbed ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_checkpoint import write_tiny
from tiny_engine import Answer, answers, greedy, run, tiny_config

from flyray.actors.model.prompt_attention import least_expanded_rows
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.request import Generate
from flyray.cluster.engine import Engine, EngineClient
from flyray.kernels.select import select_kernels

pytestmark = pytest.mark.usefixtures("local_cluster")


async def together(engine: Engine, requests: list[Generate]) -> dict[str, Answer]:
    async with EngineClient(engine.address, engine.keys) as client:
        return await answers(client, requests)


def test_texts_are_those_of_absorbed_prompts(tmp_path: Path) -> None:
    """Whole prompts and their parts, beside short ones that decode; in floats, whose rounding flips no code."""
    checkpoint = write_tiny(tmp_path / "tiny")
    requests = [greedy(f"{length}", length, 6) for length in (9, 80, 120, 170)]
    changes = {"prompt_attention": "expanded", "max_batch_tokens": 160, "kv_pages": 70}
    config = tiny_config(checkpoint, precision="w4a16", backend="reference", **changes)
    with Engine(config) as engine:
        assert any(line.startswith("prompts: 71 or more tokens") for line in engine.precision_plan)
        found = run(together(engine, requests))
    single = SingleProcessModel.load(checkpoint, "w4a16", select_kernels("cpu", 1), 200)
    assert least_expanded_rows(single.config) == 71
    for request in requests:
        assert (found[request.request].error, found[request.request].finish) == ("", "length")
        assert list(found[request.request].tokens) == single.generate(request.prompt, 6)
