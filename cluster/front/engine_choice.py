"""Which engine takes a request: one that has the beginning of its prompt, weighed against how much each runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...actors.prefix_cache import extend_keys

# Prompt tokens that an engine would rather compute than have one request more than another: about what an answer of a
# few hundred tokens takes from the others of its batch.
REQUEST_TOKENS = 256
# Pages of a prompt that are looked at; hashing takes 1.5 µs each, on the event loop of all streams.
MOST_PAGES = 4096


@dataclass(frozen=True)
class Candidate:
    """An engine that takes requests. load: requests that run or wait there. cached: tokens of the prompt that its
    prefix cache has, as far as is known here."""

    load: int
    cached: int

    @property
    def cost(self) -> int:
        """In prompt tokens; of several engines the one with the least is right."""
        return self.load * REQUEST_TOKENS - self.cached


def choose(candidates: Sequence[Candidate]) -> int:
    """The place of the cheapest one; of equals the one with the least load, then the first. Needs at least one."""
    return min(range(len(candidates)), key=lambda place: (candidates[place].cost, candidates[place].load))


def page_keys(prompt: Sequence[int], page_size: int) -> list[bytes]:
    """The keys of a prompt's first full pages, as the engines' prefix caches count them."""
    keys: list[bytes] = []
    # The last token of a prompt is computed in any case, so a page that ends with it is never taken from the cache.
    extend_keys(keys, prompt[: min(len(prompt) - 1, MOST_PAGES * page_size)], page_size)
    return keys


class PrefixMemory:
    """What an engine's prefix cache holds by the prompts that were sent there: the pages used last, at most `pages`.

    A guess: other fronts send prompts too, and shards have a cache each. It only says where a prompt is sent.
    """

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._keys: dict[bytes, None] = {}

    def add(self, keys: Sequence[bytes]) -> None:
        """The pages of a prompt that is sent there. Its first page counts as the one used last: without it the others
        are of no use."""
        for key in reversed(keys[: self._pages]):
            self._keys.pop(key, None)
            self._keys[key] = None
        while len(self._keys) > self._pages:
            del self._keys[next(iter(self._keys))]

    def match(self, keys: Sequence[bytes]) -> int:
        """How many pages, from the first on, are there."""
        return next((place for place, key in enumerate(keys) if key not in self._keys), len(keys))
