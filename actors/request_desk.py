"""Clients' requests on their way to the scheduler, and its news on their way back."""

from __future__ import annotations

from .client_port import ClientPort
from .request import Generate, Progress
from .request_book import RequestBook
from .scheduler import Scheduler
from .step_news import StepNews


class RequestDesk:
    """Used by the router's loop thread alone. dropped: requests under a name that their client uses already."""

    def __init__(self, scheduler: Scheduler, clients: ClientPort) -> None:
        self.dropped = 0
        self._scheduler, self._clients = scheduler, clients
        self._book = RequestBook()

    def open(self, client: bytes, message: Generate) -> None:
        """Takes up a request, or tells the client why it cannot run."""
        request = self._book.open(client, message)
        if request is None:
            # Answering would end the client's first request of that name.
            self.dropped += 1
            return
        refusal = self._scheduler.add(request)
        if refusal is not None:
            self.deliver(StepNews(items=[refusal]))

    def refuse(self, client: bytes, message: Generate, error: str) -> None:
        """The engine takes no requests, for this reason."""
        self._clients.send(client, StepNews(items=[Progress.failed(message.request, error, lost=True)]))

    def cancel(self, client: bytes, request: str) -> None:
        """Ends a request that its client does not want any more, if there is one of that name."""
        name = self._book.close(client, request)
        if name is not None:
            self._scheduler.cancel(name)

    def deliver(self, news: StepNews) -> None:
        """Tells the clients."""
        for client, mine in self._book.deliver(news).items():
            if not self._clients.send(client, mine):
                self._give_up(client, mine)

    def _give_up(self, client: bytes, unsent: StepNews) -> None:
        """Cancels the requests of a client that is gone or reads nothing."""
        for progress in unsent.items:
            if progress.finish:
                self._clients.remember_lost(client, progress.request)
        for request, name in self._book.close_all(client):
            self._scheduler.cancel(name)
            self._clients.remember_lost(client, request)
