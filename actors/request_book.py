"""Whose request is whose: clients name their requests as they like, the scheduler needs names of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from .request import Generate, Progress


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

    def deliver(self, news: Iterable[Progress]) -> dict[bytes, tuple[Progress, ...]]:
        """Sorts news by client, under the client's names; finished requests are removed."""
        by_client: dict[bytes, list[Progress]] = defaultdict(list)
        for progress in news:
            owner = self._owners.get(progress.request)
            if owner is None:
                continue  # its client is gone, and the scheduler had not heard yet
            client, request = owner
            if progress.finish:
                self.close(client, request)
            by_client[client].append(Progress(**{**vars(progress), "request": request}))
        return {client: tuple(items) for client, items in by_client.items()}
