"""Distributions through a whole engine: kept and compared, for any shards and chunks; bad files end their requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_checkpoint import write_tiny
from tiny_engine import greedy, prompt, run, tiny_config

from flyray.actors.engine_config import EngineConfig
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.request import Generate, Progress
from flyray.cluster.engine import Engine, EngineClient
from flyray.cluster.front.requests import ChatRequest, CompletionRequest
from flyray.kernels.select import select_kernels

pytestmark = pytest.mark.usefixtures("local_cluster")

LENGTHS = (1, 2, 9, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def scored(length: int, keep: str = "", compare: str = "", max_tokens: int = 0) -> Generate:
    return replace(greedy(f"of {length}", length, max_tokens, score=True), keep=keep, compare=compare)


def finished(config: EngineConfig, requests: list[Generate]) -> list[Progress]:
    """What an engine says last of each request, all run at once."""

    async def ask(engine: Engine) -> list[Progress]:
        async with EngineClient(engine.address, engine.keys) as client:
            streams = [client.generate(request) for request in requests]
            found = []
            for stream in streams:
                news = [progress async for progress in stream]
                assert news[-1].finish
                # scores come once, with the news that end the prompt
                found.append(next((each for each in news if each.scores), news[-1]))
            return found

    with Engine(config) as engine:
        return run(ask(engine))


def distributions(checkpoint: Path, precision: str, length: int) -> np.ndarray:
    """[n - 1, V] float64 log probabilities of one process's logits."""
    model = SingleProcessModel.load(checkpoint, precision, select_kernels("cpu", 1), 64)
    logits = model.prefill(prompt(length)).numpy()[:-1].astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_what_one_format_kept_another_is_compared_with(checkpoint: Path, tmp_path: Path) -> None:
    keeping = tiny_config(checkpoint, precision="w4a16", max_batch_tokens=7)
    kept = finished(keeping, [scored(length, keep=str(tmp_path / str(length))) for length in LENGTHS])
    again = [scored(length, compare=str(tmp_path / str(length))) for length in LENGTHS]
    same = finished(replace(keeping, max_batch_tokens=64, shards=2), again)
    other = finished(tiny_config(checkpoint, precision="w4a8", max_batch_tokens=16, shards=3), again)
    for length, before, equal, found in zip(LENGTHS, kept, same, other, strict=True):
        assert (before.divergences, before.agreements) == ((), ())
        assert (equal.scores, equal.divergences) == (before.scores, (0.0,) * (length - 1))
        assert equal.agreements == (True,) * (length - 1)
        p, q = distributions(checkpoint, "w4a16", length), distributions(checkpoint, "w4a8", length)
        expected = (np.exp(p) * (p - q)).sum(-1)
        np.testing.assert_allclose(found.divergences, expected, rtol=1e-4, atol=1e-6)
        assert found.agreements == tuple((p.argmax(-1) == q.argmax(-1)).tolist())
        assert all(each > 1e-5 for each in found.divergences)
        assert (tmp_path / str(length)).stat().st_size == (length - 1) * 256 * 4


def test_a_file_that_does_not_fit_ends_its_request_alone(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"1234")
    requests = [
        scored(30, compare=str(tmp_path / "missing")),
        replace(scored(31, compare=str(tmp_path / "short")), max_tokens=3),
        scored(32, keep=str(tmp_path / "no" / "folder")),
        greedy("other", 30, 5),
    ]
    config = tiny_config(checkpoint, shards=2, max_batch_tokens=8)

    async def twice(engine: Engine) -> list[list[Progress]]:
        async with EngineClient(engine.address, engine.keys) as client:
            return [[[news async for news in client.generate(request)][-1] for request in requests] for _ in range(2)]

    with Engine(config) as engine:
        for missing, short, folder, other in run(twice(engine)):
            assert missing.finish == short.finish == folder.finish == "error"
            assert (
                missing.error == f"{tmp_path / 'missing'}: kept distributions cannot be read: No such file or directory"
            )
            assert short.error.startswith(f"{tmp_path / 'short'}: holds 4 bytes of kept distributions")
            assert folder.error.startswith(f"{tmp_path / 'no' / 'folder'}: distributions cannot be kept")
            assert (other.finish, other.error) == ("length", "")
        assert engine.error == ""


@pytest.mark.parametrize("field", ["keep", "compare", "score_prompt"])
def test_no_http_request_can_name_a_file(field: str) -> None:
    chat = {"model": "kimi", "messages": [{"role": "user", "content": "hi"}]}
    for kind, body in ((ChatRequest, chat), (CompletionRequest, {"model": "kimi", "prompt": "hi"})):
        kind.model_validate(body)
        with pytest.raises(ValidationError, match=field):
            kind.model_validate(body | {field: "/etc/motd"})
