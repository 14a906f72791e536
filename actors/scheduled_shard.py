"""One shard as the scheduler knows it: whose pages are whose, and which sequences run there."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from .live_request import LiveRequest
from .pages import PageAllocator
from .prefix_cache import PrefixCache
from .scheduler_config import SchedulerConfig
from .step_plan import Slice


class ScheduledShard:
    """Its pages are free, known and free (see `PrefixCache`), or held; of the free ones some are reserved.

    A sequence has pages for its prompt reserved from its admission on, so prefills never run out of pages; where
    nothing may be preempted, for its whole answer too.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._cache = PrefixCache(PageAllocator(config.num_pages, config.page_size))
        self._reserved = 0
        self.running: list[LiveRequest] = []
        """By rank."""
        self.ends: list[int] = []
        """Sequences that the shard must be told to drop."""

    @property
    def free_pages(self) -> int:
        """Pages that are neither held nor reserved."""
        return self._cache.free_pages - self._reserved

    @property
    def cached_pages(self) -> int:
        return self._cache.cached_pages

    @property
    def load(self) -> int:
        """Pages held or reserved, without those reserved ones that will come from others."""
        awaited = sum(min(live.awaited, live.reserved) for live in self.running)
        return self._config.num_pages - self.free_pages - awaited

    def has_room(self, live: LiveRequest) -> bool:
        """Whether the request can be admitted as things are."""
        return self._missing(live, self._found(live)) <= 0 and len(self.running) < self._config.max_batch_tokens

    def victims(self, live: LiveRequest) -> tuple[LiveRequest, ...] | None:
        """Sequences of lower priorities, the fewest, latest first, without which `has_room`; None if there is no way.

        A page that only several victims hold together counts as none: rather one victim more than too little room.
        """
        found = self._found(live)
        missing, chosen = self._missing(live, found), []
        for victim in reversed(self.running):
            if victim.request.priority <= live.request.priority:
                return None
            if victim.scoring:
                continue
            chosen.append(victim)
            # What it holds of the request's own prefix is kept.
            missing -= victim.reserved + self._cache.freed_by(set(victim.pages).difference(found))
            if missing <= 0 and len(self.running) - len(chosen) < self._config.max_batch_tokens:
                return tuple(chosen)
        return None

    def shared_pages(self, live: LiveRequest) -> int:
        """Pages of the request's text that are known here, or will be when the prompts that run here have run."""
        best = len(self._found(live))
        limit = self._sharable(live)
        for other in self.running:
            if other.prefilling and other.keys and limit > best:
                best = max(best, _common(live.keys, other.keys, limit))
        return best

    def admit(self, live: LiveRequest, number: int, shard: int) -> None:
        """Begins the request, for which there is room, as a sequence of this shard, whose own number is `shard`."""
        live.begin(number, shard)
        live.reserved = self._wanted(live)
        self._reserved += live.reserved
        self.catch_up(live)
        live.awaited = max(self.shared_pages(live) - len(live.pages), 0)
        insort(self.running, live, key=_rank)

    def remove(self, live: LiveRequest) -> None:
        """Frees all that a sequence has. Steps in flight may still write its pages: they run before later plans do."""
        self._cache.release(live.pages)
        self._reserved -= live.reserved
        live.stop()
        del self.running[bisect_left(self.running, live.rank, key=_rank)]
        if live.started:
            self.ends.append(live.number)

    def victim(self, needing: LiveRequest) -> LiveRequest | None:
        """Who gives its pages to this sequence: the last by rank, at worst itself. None if all those are scoring."""
        for live in reversed(self.running):
            if not live.scoring:
                return live
            if live is needing:
                break
        return None

    def needs_page(self, live: LiveRequest) -> bool:
        """Whether the sequence's next token goes to a page that it does not have yet."""
        return len(live.pages) * self._config.page_size <= live.position

    def has_page(self, live: LiveRequest) -> bool:
        """Whether there is a page more for the sequence."""
        return bool(live.reserved) or self.free_pages > 0

    def add_page(self, live: LiveRequest) -> int:
        """The sequence's next page, of which the shard is told."""
        self._hand_over(live, 1)
        live.told = len(live.pages)
        return live.pages[-1]

    def catch_up(self, live: LiveRequest) -> None:
        """Moves a prefill over what others have run since, or are running in this very step."""
        found = self._found(live)
        if len(found) * self._config.page_size <= live.position:
            return
        kept = live.position // self._config.page_size
        held = len(live.pages)
        self._cache.hold(found[kept:])
        self._cache.release(live.pages[kept:])
        live.pages[kept:] = found[kept:]
        live.told = min(live.told, kept)
        gained = len(live.pages) - held
        live.reserved -= gained
        live.awaited -= min(gained, live.awaited)
        self._reserved -= gained
        live.known_pages = len(found)
        live.move(len(found) * self._config.page_size, from_cache=True)

    def take(self, live: LiveRequest, count: int) -> Slice:
        """The next `count` tokens that the sequence began with, with the pages they need; moves the sequence on."""
        request, start, end = live.request, live.position, live.position + count
        missing = -(-end // self._config.page_size) - len(live.pages)
        new_pages: tuple[int, ...] = ()
        if missing > 0:
            self._hand_over(live, missing)
        if live.told < len(live.pages):
            new_pages = tuple(live.pages[live.told :])
            live.told = len(live.pages)
        sample = end >= live.prefill and request.max_tokens > 0
        live.sampled += sample
        live.in_flight += 1
        live.move(end, from_cache=False)
        self.register(live)
        next_token = request.prompt[end] if live.scoring and end < len(request.prompt) else -1
        return Slice(live.number, start, tuple(live.text[start:end]), new_pages, sample, next_token)

    def _hand_over(self, live: LiveRequest, count: int) -> None:
        """Gives a sequence its next pages, of those reserved as far as they go."""
        live.pages.extend(self._cache.allocate(count))
        promised = min(count, live.reserved)
        live.reserved -= promised
        self._reserved -= promised

    def register(self, live: LiveRequest) -> None:
        """Makes those pages of a running sequence known that are full of tokens that are known and planned to run."""
        if not live.shares:
            return
        full = min(live.position, len(live.text)) // self._config.page_size
        if full > live.known_pages:
            live.extend_keys(self._config.page_size)
            for index in range(live.known_pages, full):
                self._cache.register(live.pages[index], live.keys[index])
            live.known_pages = full

    def clear_cache(self) -> None:
        """Forgets the content of all pages."""
        self._cache.clear()

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._config.page_size)

    def _wanted(self, live: LiveRequest) -> int:
        """Pages that are a request's from its admission on."""
        return self._pages_for(len(live.text)) if self._config.preemption else self._config.pages_for(live.request)

    def _missing(self, live: LiveRequest, found: Sequence[int]) -> int:
        """How many more free pages are needed to admit a request whose text begins with the known pages `found`.

        Beyond what it reserves there has to be one more page for its answer, or it would be preempted at once.
        """
        wanted = min(self._wanted(live) + 1, self._config.pages_for(live.request))
        return wanted - len(found) + self._cache.idle_among(found) - self.free_pages

    def _found(self, live: LiveRequest) -> tuple[int, ...]:
        """The known pages that the request's text begins with."""
        return self._cache.find(live.keys[: self._sharable(live)])

    def _sharable(self, live: LiveRequest) -> int:
        """Full pages of a text but for its last token, which must run to say how it goes on."""
        return (len(live.text) - 1) // self._config.page_size if live.shares else 0


def _rank(live: LiveRequest) -> tuple[int, int]:
    return live.rank


def _common(keys: Sequence[bytes], others: Sequence[bytes], limit: int) -> int:
    """How many of the first `limit` keys two texts share: equal keys mean equal texts up to there."""
    count = min(limit, len(keys), len(others))
    return bisect_left(range(count), True, key=lambda index: keys[index] != others[index])
