"""Whose request is whose: clients name their requests as they like, the scheduler needs names of its own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from .request import Generate
from .step_news import StepNews


class RequestBook:
    """The unfinished requests of all clients. Scheduler names are "n/name" with a number n that is never used twice."""

    def __init__(self) -> None:
        self._count = 0
        self._names: dict[tuple[bytes, str], str] = {}
        self._owners: dict[str, tuple[bytes, str]] = {}

    def open(self, client: bytes, request: Generate) -> Generate | None:
        """Enters a request and returns it under its scheduler name; None if the client has one of that name."""
        owner = client, request.request
        if owner in self._names:
            return None
        self._count += 1
        name = self._names[owner] = f"{self._count}/{request.request}"
        self._owners[name] = owner
        return replace(request, request=name)

    def close(self, client: bytes, request: str) -> str | None:
        """Removes a client's request; returns its scheduler name, None if there is none."""
        name = self._names.pop((client, request), None)
        if name is not None:
            del self._owners[name]
        return name

    def close_all(self, client: bytes) -> list[tuple[str, str]]:
        """Removes all of a client's requests; returns (client's name, scheduler name) of each."""
        mine = [(owner[1], name) for owner, name in self._names.items() if owner[0] == client]
        for request, _ in mine:
            self.close(client, request)
        return mine

    def deliver(self, news: StepNews) -> dict[bytes, StepNews]:
        """Sorts news by client, under the client's names; finished requests are removed."""
        by_client: dict[bytes, StepNews] = defaultdict(StepNews)
        owners = self._owners  # has none of a client that is gone, where the scheduler had not heard yet
        for name, token, logprob in zip(news.requests, news.tokens, news.logprobs, strict=True):
            if name in owners:
                client, request = owners[name]
                by_client[client].add(request, token, logprob)
        for progress in news.items:
            if progress.request in owners:
                client, request = owners[progress.request]
                if progress.finish:
                    self.close(client, request)
                by_client[client].items.append(replace(progress, request=request))
        return by_client
