"""What prompts have in common runs once: the scheduler with the prefix cache, on simulated shards."""

from __future__ import annotations

import dataclasses

from simulated_shards import CONFIG, VOCAB, Bench, expected, generate


def test_a_prefix_that_many_share_runs_once() -> None:
    """Also when all arrive together, on several shards and in chunks."""
    sizes = {"num_pages": 1200, "page_size": 16, "max_batch_tokens": 512, "context_length": 1100, "max_sequences": 16}
    bench = Bench(dataclasses.replace(CONFIG, **sizes))
    prefix = [place * place % VOCAB for place in range(1000)]
    requests = [generate(f"{number}", [*prefix, number // VOCAB, *[number % VOCAB] * 8], 3) for number in range(16)]
    for request in requests:
        bench.add(request)
    bench.drain()
    assert bench.answers == {request.request: expected(request) for request in requests}
    # 62 pages are shared; each has the 8 tokens behind them, its own 9, and 2 tokens that it generates and runs.
    assert sum(shard.ran for shard in bench.shards) == 992 + 16 * (8 + 9 + 2)
    stats = bench.scheduler.stats
    assert (stats.prompt_tokens, stats.cached_tokens) == (16 * 1009, 15 * 992)
    assert [answer.cached_tokens for answer in bench.answers.values()] == [0] + [992] * 15


def test_short_prefixes_do_not_bring_all_to_one_shard() -> None:
    bench = Bench(dataclasses.replace(CONFIG, num_pages=64))
    for number in range(8):
        bench.add(generate(f"{number}", [1, 2, 3, 4, *[number] * 16], 4))
    plans = bench.schedule()
    assert plans is not None
    assert [len(shard.running) for shard in bench.scheduler._shards] == [4, 4]


def test_without_the_cache_every_prompt_runs() -> None:
    bench = Bench(dataclasses.replace(CONFIG, prefix_cache=False))
    for name in "ab":
        bench.add(generate(name, [1] * 12, 1))
        bench.drain()
    assert sum(shard.ran for shard in bench.shards) == 24
    assert (bench.scheduler.stats.cached_pages, bench.scheduler.stats.cached_tokens) == (0, 0)


def test_an_answer_is_a_prefix_too() -> None:
    """As in a chat's next turn."""
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    first = generate("a", [1] * 6, 8)
    bench.add(first)
    bench.drain()
    before = bench.shards[0].ran
    bench.add(second := generate("b", [*first.prompt, *expected(first).tokens, 2], 1))
    bench.drain()
    assert (bench.answers["b"], bench.answers["b"].cached_tokens) == (expected(second), 12)
    assert bench.shards[0].ran == before + 3


def test_what_scores_its_prompt_shares_nothing() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    for name in "ab":
        bench.add(generate(name, [1] * 12, 1, score_prompt=True))
        bench.drain()
    assert bench.shards[0].ran == 24
    assert bench.scheduler.stats.cached_pages == 0


def test_a_cleared_cache_gives_nothing() -> None:
    bench = Bench(dataclasses.replace(CONFIG, shards=1))
    for name in "ab":
        bench.add(generate(name, [1] * 12, 1))
        bench.drain()
        assert bench.scheduler.stats.cached_pages == 3
        bench.scheduler.clear_cache()
        assert bench.scheduler.stats.cached_pages == 0
    assert bench.shards[0].ran == 24


def test_a_prefill_takes_up_what_overtook_it() -> None:
    """It had begun a page that another has filled meanwhile, and drops its own."""
    config = dataclasses.replace(CONFIG, shards=1, num_pages=16, max_batch_tokens=6)
    bench = Bench(config)
    prompt = [place % 7 for place in range(24)]
    bench.add(generate("batch", prompt, 2, priority=1))
    bench.schedule()
    bench.add(chat := generate("chat", prompt[:20], 1))
    bench.drain()
    assert bench.answers == {"batch": expected(generate("batch", prompt, 2)), "chat": expected(chat)}
    # The batch request had run 6 tokens; it goes on behind the 5 pages that the other has.
    assert (bench.answers["chat"].cached_tokens, bench.answers["batch"].cached_tokens) == (4, 14)
