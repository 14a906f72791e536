"""A front's engines: which there are, how each is, and which one takes a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Sequence

from ...actors.request import EngineStatus
from ..chat import ChatService, ServiceLimits
from ..config import ServeSection
from ..engine_client import EngineClient
from ..engine_roster import EngineRoster
from ..engine_state import EngineAddress, EngineState
from ..tokenizer import Tokenizer
from .engine_choice import choose, page_keys
from .engine_member import EngineMember
from .engine_view import EngineView
from .errors import EngineUnavailable
from .journal import Journal
from .metrics import FrontMetrics, MeteredTokens

logger = logging.getLogger(__name__)

_LOOK_PERIOD_S = 1.0
_HURRIED_PERIOD_S = 0.2
_ASK_TIMEOUT_S = 2.0


class EnginePool:
    """`Engines` of many, which come, drain and go; `run` it as a task.

    Before the first one is ready requests are refused, for a start may fail. Once there was one they wait, from the
    loss of the last one on `recovery_timeout_s` at most. Where there is none because nobody wanted one
    (`serve.engines.min` 0) the first request has one started, and waits as long.
    """

    def __init__(
        self,
        roster: EngineRoster,
        section: ServeSection,
        tokenizer: Tokenizer,
        model_name: str,
        metrics: FrontMetrics,
    ) -> None:
        self._roster, self._section = roster, section
        self._tokenizer, self._model_name = tokenizer, model_name
        self._source = MeteredTokens(Journal(self, metrics.replayed), metrics)
        self._members: dict[str, EngineMember] = {}
        self._states: tuple[EngineState, ...] = ()
        self._service: ChatService | None = None
        self._start_seconds = 0.0  # of the last start that ended well
        self._waking: asyncio.Task[None] | None = None
        self._wait_until = -math.inf  # when waiting for an engine ends, by the event loop's clock
        self._had_one = False
        self._looked = False
        self._changed = asyncio.Event()
        """Set, and replaced by a new one, whenever what requests wait for may have changed."""

    async def service(self) -> ChatService:
        """The chat service. Raises EngineUnavailable with the reason while there is no engine to wait for."""
        await self._one_ready()
        assert self._service is not None  # made with the first engine
        return self._service

    async def engine_for(self, prompt: Sequence[int], lost: EngineClient | None = None) -> EngineClient:
        """See `Engines`: the engine that has most of the prompt and least else to do (`engine_choice`)."""
        for member in self._members.values():
            if member.client is lost:
                member.lose("it lost a request")
        ready = await self._one_ready()
        if lost is not None:
            ready = [member for member in ready if member.client.answers == lost.answers] or ready
        # Of one engine there is nothing to choose, and hashing a long prompt holds up all streams for milliseconds.
        several = self._section.engines.max > 1
        sizes = {member.address.page_size for member in ready}
        keys = {size: page_keys(prompt, size) if size and several else [] for size in sizes}
        chosen = ready[choose([member.candidate(keys[member.address.page_size]) for member in ready])]
        chosen.sent(keys[chosen.address.page_size])
        return chosen.client

    async def views(self) -> list[EngineView]:
        """All engines there are, in the order of their names, as they are now."""
        known = dict(self._members)
        silent = await asyncio.gather(*(member.ask(_ASK_TIMEOUT_S) for member in known.values()))
        views = [_view(member, error) for member, error in zip(known.values(), silent, strict=True)]
        views += [
            EngineView(each.name, each.stage, each.error, None) for each in self._states if each.name not in known
        ]
        return sorted(views, key=lambda view: view.name)

    def idle(self) -> bool:
        """Whether there is no engine for want of requests; the next one has one started."""
        return self._looked and not self._states and not self._section.engines.min

    def absence(self) -> EngineUnavailable:
        """Why no engine takes requests, and when to come back."""
        for state in self._states:
            if state.stage == "starting":
                return EngineUnavailable("the engine is starting", state.seconds_left(self._start_seconds))
        errors = [state.error for state in self._states if state.error]
        errors += [member.error for member in self._members.values()]
        return EngineUnavailable("; ".join(errors) or "the engine is starting")

    async def trace(self, engine: str, steps: int) -> EngineStatus:
        """The state of the engine of that name once it has recorded so many steps. Raises EngineUnavailable if there is
        none, EngineUnreachable if it goes."""
        if engine not in self._members:
            raise EngineUnavailable(f"there is no engine {engine!r}")
        return await self._members[engine].client.status(steps)

    async def run(self) -> None:
        """Looks which engines there are until it is cancelled."""
        try:
            while True:
                try:
                    await self._look()
                except Exception:  # Serve cannot say now; the engines known are asked themselves
                    logger.warning("which engines there are is not known", exc_info=True)
                await asyncio.sleep(_LOOK_PERIOD_S if self._ready() else _HURRIED_PERIOD_S)
        finally:
            if self._waking is not None:
                self._waking.cancel()
            await asyncio.gather(*(member.close() for member in self._members.values()))

    def _ready(self) -> list[EngineMember]:
        return [member for member in self._members.values() if member.takes_requests]

    async def _one_ready(self) -> list[EngineMember]:
        """The engines that take requests, at least one. Raises EngineUnavailable."""
        if self.idle() and self._waited:
            self._wait()
        while not (ready := self._ready()):
            if self.idle():
                self._wake()
            if self._waited:
                raise self.absence()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._wait_until):
                    await self._changed.wait()
        return ready

    def _wake(self) -> None:
        if self._waking is None or self._waking.done():
            self._waking = asyncio.ensure_future(self._roster.wake())
            self._waking.add_done_callback(_log_failure)

    @property
    def _waited(self) -> bool:
        """Whether nobody waits any more."""
        return asyncio.get_running_loop().time() >= self._wait_until

    def _wait(self) -> None:
        self._wait_until = asyncio.get_running_loop().time() + self._section.recovery_timeout_s

    async def _look(self) -> None:
        """Takes in who is there now."""
        self._states = tuple(await self._roster.states())
        self._looked = True
        found = {state.name: state.address for state in self._states if state.address is not None}
        for name, address in found.items():
            await self._list(name, address)
        for name, member in list(self._members.items()):
            member.listed = name in found
            if not member.listed and not member.client.open_requests:
                del self._members[name]
                await member.close()
        self._start_seconds = next((state.seconds for state in self._states if state.address), self._start_seconds)
        self._note()

    async def _list(self, name: str, address: EngineAddress) -> None:
        """Meets an engine; one that has begun anew elsewhere is another one."""
        known = self._members.get(name)
        if known is not None and known.address != address:
            del self._members[name]
            await known.close()
        if name not in self._members:
            member = self._members[name] = EngineMember(name, address, self._note)
            member.start()

    def _note(self) -> None:
        """Something has changed: whether there is an engine, or hope for one."""
        ready = self._ready()
        if ready:
            self._limit(min(member.address.longest_sequence for member in ready))
        elif self._states and all(state.for_good for state in self._states):
            self._wait_until = -math.inf
        elif self._had_one:
            self._wait()
        self._had_one = bool(ready)
        self._changed.set()
        self._changed = asyncio.Event()

    def _limit(self, longest_sequence: int) -> None:
        limits = ServiceLimits(longest_sequence, self._section.default_max_tokens, self._section.max_queue)
        if self._service is None or self._service.limits != limits:  # else it goes on counting who waits
            self._service = ChatService(self._source, self._tokenizer, self._model_name, limits)


def _view(member: EngineMember, silent: str) -> EngineView:
    if not silent and member.status is not None and member.status.recovering:
        return EngineView(member.name, "recovering", member.error, member.status)
    if silent or not member.ready:
        return EngineView(member.name, "lost", silent or member.error, None)
    return EngineView(member.name, "ready" if member.listed else "draining", "", member.status)


def _log_failure(waking: asyncio.Task[None]) -> None:
    if not waking.cancelled() and waking.exception() is not None:
        logger.warning("no engine was started: %s", waking.exception())
