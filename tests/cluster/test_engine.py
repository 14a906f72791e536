"""An engine of real processes: the same bits for any shards, batch and chunks; clients of all kinds."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import zmq
from standing import standing
from tiny_checkpoint import TINY, write_tiny
from tiny_engine import GREEDY, PATIENCE_S, Answer, answer, answers, greedy, prompt, run, tiny_config

from flyray.actors.link import Links
from flyray.actors.model.single import SingleProcessModel
from flyray.actors.request import Cancel, EngineStatus, Generate, ProgressBatch
from flyray.actors.router import StartProgress
from flyray.actors.step_plan import Sampling, StepPlan
from flyray.actors.wire import decode, encode
from flyray.cluster.engine import Engine, EngineClient
from flyray.kernels.select import select_kernels

pytestmark = pytest.mark.usefixtures("local_cluster")

# How the same requests are run; every one must give the same bits.
VARIANTS = {
    "1 shard": {"shards": 1},
    "2 shards, prompts cut into chunks of 7": {"shards": 2, "max_batch_tokens": 7},
    "3 shards over TCP": {"shards": 3, "transport": "tcp"},
    "3 tensor-parallel shards, prompts cut into chunks of 7": {
        "shards": 3,
        "max_batch_tokens": 7,
        "attention": "tensor_parallel",
    },
}
FORMATS = ("w4a8", "w8a8")
LENGTHS = (1, 5, 17, 40)
PENALIZED = replace(
    GREEDY,
    presence_penalty=0.125,
    frequency_penalty=0.25,
    repetition_penalty=1.5,
    logit_bias=((7, 0.5), (70, -100.0)),
    min_tokens=6,
    stop_ban=(3, 4, 5),
    top_logprobs=3,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def requests() -> list[Generate]:
    """Greedy, penalized, scored and sampled requests of several lengths."""
    plain = [greedy(f"greedy {length}", length, score=length == 40) for length in LENGTHS]
    sampling = Sampling(0.9, 0.95, 50, 1234)
    sampled = [
        Generate(f"sampled {seed}", prompt(9), 12, replace(sampling, seed=seed), (), 0, False) for seed in (1, 2)
    ]
    penalized = Generate("penalized", prompt(17), 12, PENALIZED, (), 0, False)
    return [*plain, *sampled, penalized, Generate("scored", prompt(30), 0, sampling, (), 1, True)]


async def alone_and_together(engine: Engine) -> tuple[dict[str, Answer], dict[str, Answer]]:
    """Every request by itself, and all at once among others from a second client."""
    async with EngineClient(engine.address, engine.keys) as client, EngineClient(engine.address, engine.keys) as other:
        alone = {request.request: await answer(client, request) for request in requests()}
        crowd = asyncio.create_task(answers(other, [greedy(f"crowd {length}", length) for length in range(2, 12)]))
        together = await answers(client, requests())
        assert {each.finish for each in (await crowd).values()} == {"length"}
    return alone, together


@dataclass(frozen=True)
class Transcripts:
    """answers[variant, alone or together][request]."""

    precision: str
    answers: dict[str, dict[str, Answer]]


@pytest.fixture(scope="module", params=FORMATS)
def transcripts(request: pytest.FixtureRequest, checkpoint: Path) -> Transcripts:
    """What every variant answers in one format, alone and together."""
    found: dict[str, dict[str, Answer]] = {}
    for name, changes in VARIANTS.items():
        with Engine(tiny_config(checkpoint, precision=request.param, **changes)) as engine:
            assert ("tcp:" in engine.address) == ("TCP" in name)
            found[f"{name}, alone"], found[f"{name}, together"] = run(alone_and_together(engine))
    return Transcripts(request.param, found)


def test_answers_are_equal_to_the_bit_for_any_shards_batch_and_chunks(transcripts: Transcripts) -> None:
    expected = transcripts.answers["1 shard, alone"]
    assert all(each.error == "" and each.finish == "length" for each in expected.values()), expected
    for name, found in transcripts.answers.items():
        assert found == expected, name
    assert len({each.tokens for each in expected.values()}) == len(expected), "the texts should differ"


def test_scores_and_logprobs_are_complete(transcripts: Transcripts) -> None:
    found = transcripts.answers["1 shard, together"]
    assert len(found["scored"].scores) == 29
    assert found["scored"].tokens == ()
    assert len(found["greedy 40"].scores) == 39
    assert found["greedy 5"].scores == ()
    for each in found.values():
        assert len(each.logprobs) == len(each.tokens)
        assert all(value <= 0 for value in (*each.logprobs, *each.scores))


def test_greedy_texts_are_those_of_one_process(checkpoint: Path, transcripts: Transcripts) -> None:
    model = SingleProcessModel.load(checkpoint, transcripts.precision, select_kernels("cpu", 1), 64)
    for length in LENGTHS:
        text = tuple(model.generate(prompt(length), 12))
        assert transcripts.answers["1 shard, alone"][f"greedy {length}"].tokens == text


def test_penalties_are_those_of_numpy_on_the_logits_of_one_process(checkpoint: Path, transcripts: Transcripts) -> None:
    model = SingleProcessModel.load(checkpoint, transcripts.precision, select_kernels("cpu", 1), 64)
    found = transcripts.answers["1 shard, together"]["penalized"]
    begin, how = len(prompt(17)), PENALIZED
    given = model.prefill([*prompt(17), *found.tokens]).double()
    for step, token in enumerate(found.tokens):
        logits = given[begin - 1 + step].numpy().copy()
        best = given[begin - 1 + step].log_softmax(dim=0).sort(descending=True, stable=True)
        assert [each for each, _ in found.top[step]] == best.indices[:3].tolist()
        assert [value for _, value in found.top[step]] == pytest.approx(best.values[:3].tolist(), abs=2e-6)
        for biased, bias in how.logit_bias:
            logits[biased] += bias
        seen = [*{*prompt(17), *found.tokens[:step]}]
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
        count = np.bincount(np.array(found.tokens[:step], dtype=np.int64), minlength=len(logits))
        logits -= how.frequency_penalty * count + how.presence_penalty * (count > 0)
        logits[[*how.stop_ban] if step < how.min_tokens else []] = -np.inf
        assert token == int(logits.argmax())


def crowded() -> list[Generate]:
    """Requests that need more pages than `scarce` has; some begin alike, some end alike."""
    how = Sampling(0.9, 0.95, 50, 7, presence_penalty=0.4, repetition_penalty=1.1)
    texts = [prompt(100)[: 9 * number] + prompt(150, number // 2) for number in range(10)]
    return [
        Generate(
            f"{number}", text, 90, (PENALIZED, replace(how, seed=number), GREEDY)[number % 3], (), number % 2, False
        )
        for number, text in enumerate(texts)
    ]


def one_prefix() -> list[Generate]:
    """16 requests that share 1,000 tokens."""
    return [
        Generate(f"{number}", prompt(1000, 99) + prompt(9, number), 8, GREEDY, (), 0, False) for number in range(16)
    ]


async def crowd_then_prefix(engine: Engine) -> tuple[list[dict[str, Answer]], list[EngineStatus]]:
    """What the requests answer, and the engine's figures before, between and behind them."""
    async with EngineClient(engine.address, engine.keys) as client:
        figures, found = [await client.status()], []
        for requests in (crowded(), one_prefix()):
            with standing(engine.router.local_pids[0]):  # until all are there
                waiting = asyncio.create_task(answers(client, requests))
                await in_the_engine(client, len(requests))
            found.append(await waiting)
            figures.append(await client.status())
    return found, figures


async def in_the_engine(client: EngineClient, count: int) -> None:
    """Returns when so many requests run or wait there."""
    while (status := await client.status()).running + status.waiting < count:
        pass


def test_with_few_pages_and_shared_ones_answers_are_the_same_to_the_bit(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "long")
    (path / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 2048}))
    roomy = tiny_config(path, kv_pages=2200, prefix_cache=False)
    scarce = tiny_config(path, kv_pages=176, max_batch_tokens=100)
    with Engine(roomy) as engine:
        expected, figures = run(crowd_then_prefix(engine))
        assert (figures[2].preemptions, figures[2].cached_tokens, figures[2].cached_pages) == (0, 0, 0)
    with Engine(scarce) as engine:
        found, figures = run(crowd_then_prefix(engine))
    assert found == expected
    assert {each.finish for answered in found for each in answered.values()} == {"length"}
    crowd, prefix = figures[1], figures[2]
    assert crowd.preemptions > 0
    assert crowd.cached_tokens > 0
    # The 1,000 tokens fill 125 pages, so each request runs its own 9 and the first one all.
    ran = prefix.prompt_tokens - prefix.cached_tokens - (crowd.prompt_tokens - crowd.cached_tokens)
    assert ran == 1000 + 16 * 9
    assert prefix.free_pages == prefix.total_pages


@pytest.fixture(scope="module")
def loaded() -> list[StartProgress]:
    """What the engine reported while it started."""
    return []


@pytest.fixture(scope="module")
def engine(checkpoint: Path, loaded: list[StartProgress]) -> Iterator[Engine]:
    """Two shards."""
    engine = Engine(tiny_config(checkpoint, shards=2, kv_pages=64))
    engine.start(loaded.append)
    yield engine
    engine.stop()


@pytest.mark.usefixtures("engine")
def test_loading_is_reported(loaded: list[StartProgress]) -> None:
    assert loaded[-1].read == loaded[-1].total
    assert len(loaded[-1].read) == 2
    assert all(total > 100_000 for total in loaded[-1].total)


def test_it_says_what_it_is(engine: Engine) -> None:
    async def ask():
        async with EngineClient(engine.address, engine.keys) as client:
            return await client.status()

    status = run(ask())
    assert (status.ready, status.error, status.shards, status.epoch) == (True, "", 2, 0)
    assert (status.total_pages, status.context_length) == (128, TINY["max_position_embeddings"])
    assert status.precision_plan == engine.precision_plan
    assert any("INT4 g32" in line for line in engine.precision_plan)
    assert "golden prompt" in engine.router.golden
    assert [report.shard for report in engine.router.reports] == [0, 1]
    assert all(report.checks for report in engine.router.reports)


def test_its_sockets_are_private(engine: Engine) -> None:
    folder = os.path.dirname(engine.address.removeprefix("ipc://"))
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


def test_stop_tokens_end_a_text_and_are_not_in_it(engine: Engine) -> None:
    async def ask() -> tuple[Answer, Answer]:
        async with EngineClient(engine.address, engine.keys) as client:
            whole = await answer(client, greedy("whole", 17))
            stop = whole.tokens[5]
            return whole, await answer(client, replace(greedy("stopped", 17), stop_tokens=(stop,)))

    whole, stopped = run(ask())
    end = whole.tokens.index(whole.tokens[5])
    assert stopped.finish == "stop"
    assert stopped.tokens == whole.tokens[:end]


def test_a_request_may_be_cancelled_by_another_task(engine: Engine) -> None:
    async def ask() -> Answer:
        async with EngineClient(engine.address, engine.keys) as client:
            with standing(engine.router.local_pids[0]):
                waiting = asyncio.create_task(answer(client, greedy("unwanted", 10, 500)))
                await in_the_engine(client, 1)
                client.cancel("unwanted")
                client.cancel("unwanted")
                cancelled = await waiting
            assert (await answer(client, greedy("unwanted", 10))).finish == "length"  # the name is free again
            return cancelled

    assert run(ask()).error == "the request was cancelled"


def test_cancelling_frees_pages_and_leaves_others_alone(engine: Engine) -> None:
    async def ask() -> None:
        async with EngineClient(engine.address, engine.keys) as client:
            news = client.generate(greedy("long", 10, 100))
            with standing(engine.router.local_pids[0]):
                other = asyncio.create_task(answer(client, greedy("other", 5, 40)))
                first = asyncio.ensure_future(anext(news))
                await in_the_engine(client, 2)
                while (await client.status()).free_pages == 128:  # its step is not yet on its way
                    pass
            assert (await first).tokens
            await news.aclose()
            assert len((await other).tokens) == 40
            # The router handles a client's messages in order, so the status comes after the cancellation.
            status = await client.status()
            assert (status.free_pages, status.running, status.waiting) == (128, 0, 0)

    run(ask())


def test_requests_that_do_not_fit_at_once_wait_their_turn(engine: Engine) -> None:
    async def ask() -> dict[str, Answer]:
        async with EngineClient(engine.address, engine.keys) as client:
            return await answers(client, [greedy(f"wide {number}", 60, 20) for number in range(16)])

    found = run(ask())
    assert {each.finish for each in found.values()} == {"length"}
    assert len({each.tokens for each in found.values()}) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": (1, 256)}, "prompt: token 256 is outside the vocabulary of 256"),
        ({"prompt": ()}, "prompt: is empty"),
        ({"max_tokens": 600}, "context_length of 512"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"sampling": Sampling(-1.0, 1.0, 0, 0)}, "sampling.temperature"),
        ({"priority": 7}, "priority: 7"),
    ],
)
def test_a_request_that_can_never_run_is_refused_by_name(engine: Engine, change: dict, named: str) -> None:
    async def ask() -> Answer:
        async with EngineClient(engine.address, engine.keys) as client:
            return await answer(client, replace(greedy("bad", 5), **change))

    refused = run(ask())
    assert refused.finish == "error"
    assert named in refused.error


def test_two_clients_may_use_the_same_name_one_client_may_not(engine: Engine) -> None:
    async def ask() -> None:
        async with EngineClient(engine.address) as one, EngineClient(engine.address) as two:
            both = await asyncio.gather(answer(one, greedy("same", 5)), answer(two, greedy("same", 17)))
            assert [each.finish for each in both] == ["length", "length"]
            assert both[0].tokens != both[1].tokens
            first = asyncio.ensure_future(answer(one, greedy("twice", 5)))
            await asyncio.sleep(0)  # it has asked, and its answer is not read before the next turn
            with pytest.raises(ValueError, match="'twice' is not finished yet"):
                await anext(one.generate(greedy("twice", 5)))
            assert (await first).finish == "length"

    run(ask())


def test_bytes_that_are_no_request_are_dropped_counted_and_hurt_nobody(engine: Engine) -> None:
    plan = StepPlan("engine", 0, 0, "colocated-1", (), (), (), False)
    strange = [b"", b"\xc1", b"hello", os.urandom(100), encode(plan), encode(ProgressBatch("engine", ()))]

    async def dropped() -> int:
        async with EngineClient(engine.address) as client:
            return (await client.status()).dropped_messages

    before = run(dropped())
    links = Links(None)
    try:
        socket = links.connect(zmq.DEALER, engine.address)
        for each in strange:
            socket.send(each)
        socket.send_multipart([b"three", b"frames"])
        socket.send(encode(Cancel("of nobody")))
        socket.send(encode(greedy("good", 5)))
        tokens: list[int] = []
        while len(tokens) < 12:
            assert socket.poll(1000 * PATIENCE_S), "the good request was not answered"
            batch = decode(socket.recv())
            assert isinstance(batch, ProgressBatch)
            tokens += [token for progress in batch.news for token in progress.tokens]
    finally:
        links.close()
    assert run(dropped()) - before == len(strange) + 1


def test_a_client_that_vanishes_gives_its_pages_back(engine: Engine) -> None:
    async def ask() -> None:
        gone = Links(None)
        socket = gone.connect(zmq.DEALER, engine.address)
        async with EngineClient(engine.address) as client:
            before = (await client.status()).steps
            for number in range(64):  # two at a time, so more than 10,000 steps
                socket.send(encode(greedy(f"abandoned {number}", 10, 500)))
            assert socket.poll(1000 * PATIENCE_S)
            gone.close()
            while (await client.status()).running:  # a token that finds nobody ends them
                pass
            status = await client.status()
            assert (status.free_pages, status.waiting) == (128, 0)
            assert status.steps - before < 10_000

    run(ask())


def test_a_traced_status_has_every_stage_of_every_shard(engine: Engine) -> None:
    async def ask():
        async with EngineClient(engine.address) as client:
            traced = asyncio.create_task(client.status(trace_steps=3))
            await client.status()  # the router has the first query by now
            await answer(client, greedy("traced", 5))
            return await traced

    status = run(ask())
    assert len(status.trace) == 3 * 2
    names = {stage.name for stage in engine.shape.program.stages["colocated"]}
    for step in status.trace:
        found = {stage.name for stage in step.stages}
        idle = {name for name in names if name.split(".")[0] in ("dispatch", "experts")}
        assert found in (names, idle)
        assert all(stage.begin <= stage.end for stage in step.stages)
        assert all(one.end <= two.begin for one, two in zip(step.stages, step.stages[1:], strict=False))
    assert any({stage.name for stage in step.stages} == names for step in status.trace)
