"""Which engine a request goes to: never a worse one by both measures, and with what is known of its prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.prefix_cache import extend_keys
from flyray.cluster.front.engine_choice import REQUEST_TOKENS, Candidate, PrefixMemory, choose, page_keys

CANDIDATES = st.lists(st.builds(Candidate, st.integers(0, 300), st.integers(0, 20_000)), min_size=1, max_size=8)
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=24), min_size=1, max_size=12)


@given(CANDIDATES)
def test_no_engine_with_less_load_and_as_much_of_the_prompt_is_passed_over(candidates: list[Candidate]) -> None:
    chosen = candidates[choose(candidates)]
    assert not [other for other in candidates if other.load < chosen.load and other.cached >= chosen.cached]
    assert not [other for other in candidates if other.load <= chosen.load and other.cached > chosen.cached]


@given(CANDIDATES, st.integers(0, 300))
def test_a_prompt_that_is_computed_draws_only_so_far(candidates: list[Candidate], load: int) -> None:
    """What an engine may have more to do than the idlest one is bounded by what it need not compute."""
    chosen = candidates[choose(candidates)]
    least = min(candidate.load for candidate in candidates)
    assert (chosen.load - least) * REQUEST_TOKENS <= chosen.cached


@given(PROMPTS, st.integers(1, 5), st.integers(1, 12))
def test_memory_matches_what_an_oracle_of_prefixes_says(prompts: list[list[int]], page_size: int, pages: int) -> None:
    """Without a bound exactly the longest common prefix in pages; with one never more, and never too many pages."""
    whole, bounded = PrefixMemory(1 << 20), PrefixMemory(pages)
    sent: list[list[int]] = []
    for prompt in prompts:
        keys = page_keys(prompt, page_size)
        assert len(keys) == (len(prompt) - 1) // page_size
        expected = max((_common(prompt, other, page_size) for other in sent), default=0)
        assert whole.match(keys) == expected
        assert bounded.match(keys) <= min(expected, pages)
        whole.add(keys)
        bounded.add(keys)
        assert bounded.match(keys) == min(len(keys), pages)
        sent.append(prompt)


def test_pages_are_counted_as_the_prefix_cache_counts_them() -> None:
    prompt = list(range(100))
    keys: list[bytes] = []
    extend_keys(keys, prompt, 16)
    assert page_keys(prompt, 16) == keys
    assert page_keys(prompt[:96], 16) == keys[:5]


def _common(prompt: list[int], other: list[int], page_size: int) -> int:
    """Pages that both prompts have whole before their last tokens, and in common from the beginning."""
    pages = (min(len(prompt), len(other)) - 1) // page_size
    return next(
        (page for page in range(pages) if _page(prompt, page, page_size) != _page(other, page, page_size)), pages
    )


def _page(prompt: list[int], page: int, size: int) -> list[int]:
    return prompt[page * size : (page + 1) * size]
