"""Experts that move while requests run: the same answers before, during and after, and after a shard that cannot."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_checkpoint import write_tiny
from tiny_engine import PATIENCE_S, Answer, answers, greedy, prompt, run, tiny_config

from flyray.actors.expert_state import ExpertState
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.request import Generate
from flyray.cluster.engine import Engine, EngineClient, EngineError
from flyray.kernels.select import select_kernels

pytestmark = pytest.mark.usefixtures("local_cluster")

LENGTHS = (5, 17, 40)


def requests(round: int) -> list[Generate]:
    """The same in every round, some with scores; names differ."""
    plain = [greedy(f"greedy {length} {round}", length, score=length == 40) for length in LENGTHS]
    # One token again and again: the same few experts.
    return [*plain, *(replace(plain[0], request=f"skewed {n} {round}", prompt=(7,) * 30) for n in range(4))]


async def rounds(client: EngineClient) -> tuple[ExpertState, list[dict[str, Answer]]]:
    """Runs the requests again and again, until experts have moved, and once more; all that was answered."""
    found: list[dict[str, Answer]] = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            state = (await client.status()).experts
            got = await answers(client, requests(len(found)))
            found.append({name.rpartition(" ")[0]: answer for name, answer in got.items()})
            if state.longest_switch_s:
                return state, found


def test_answers_stay_while_experts_move_and_when_they_cannot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_tiny(tmp_path / "tiny")
    model = SingleProcessModel.load(checkpoint, "w4a8", select_kernels("cpu", 1), 64)
    texts = {f"greedy {length}": tuple(model.generate(prompt(length), 12)) for length in LENGTHS}
    config = tiny_config(
        checkpoint, shards=3, redundant_experts=1, rebalance_interval_s=0.2, prefix_cache=False, silence_s=20.0
    )

    async def main(engine: Engine) -> None:
        async with EngineClient(engine.address, engine.keys) as client:
            before = await answers(client, requests(0))
            first = {name.rpartition(" ")[0]: answer for name, answer in before.items()}
            assert {name: first[name].tokens for name in texts} == texts
            state, found = await rounds(client)
            assert all(each == first for each in found)
            assert state.failures == 0
            assert state.moved >= state.version > 0
            assert 1 <= state.imbalance < 3
            assert len(state.hottest) == 5
            assert 0.1 < state.hottest[0].share <= 1 / 3
            with pytest.raises(EngineError, match=r"rebalance_interval_s: this engine moves its experts every 0.2 s"):
                engine.override_experts(1, [0], str(checkpoint))
            # The weights are there no more, and requests come for which experts would have to move.
            (checkpoint / "model.safetensors").unlink()
            async with asyncio.timeout(PATIENCE_S):
                for token in itertools.cycle(range(256)):
                    if (await client.status()).experts.failures:
                        break
                    skewed = replace(greedy("", 1), prompt=(token,) * 60)
                    await answers(client, [replace(skewed, request=f"{token} {number}") for number in range(4)])
            assert (await client.status()).experts.imbalance >= 1
            after = await answers(client, requests(0))
            assert after == before

    with Engine(config) as engine:
        run(main(engine))
    assert "stage_experts: " in caplog.text
    assert "model.safetensors: cannot be read for tensor" in caplog.text
