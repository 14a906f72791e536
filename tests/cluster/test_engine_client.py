"""The engine's client when its connection to the router breaks."""

from __future__ import annotations

import asyncio

from flyray.actors.client_port import ClientMessage, ClientPort
from flyray.actors.link import LinkPlace, Links
from flyray.actors.request import Cancel, Generate
from flyray.actors.step_news import StepNews
from flyray.actors.step_plan import Sampling
from flyray.cluster.engine_client import EngineClient

REQUEST = Generate("r", (1,), 9, Sampling(0.0, 1.0, 0, 0), (), 0, False)
TIMEOUT_S = 150.0


class Proxy:
    """Passes TCP connections on to a port of this machine, until they are cut."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self._copies: list[asyncio.Task[None]] = []

    async def start(self) -> str:
        """Returns the address to connect to."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._copies, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers += [writer, far_writer]
        for pair in ((reader, far_writer), (far_reader, writer)):
            self._copies.append(asyncio.create_task(_copy(*pair)))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)


async def received(port: ClientPort, kind: type[ClientMessage]) -> bytes:
    """Waits for a message of this kind; returns who sent it."""
    while True:
        for client, message in port.receive():
            if isinstance(message, kind):
                return client
        await asyncio.sleep(0.01)


def token(number: int) -> StepNews:
    return StepNews(["r"], [number], [0.0])


def test_an_answer_whose_connection_broke_ends_and_is_cancelled() -> None:
    async def run() -> None:
        links = Links(None)
        port = ClientPort(links, LinkPlace(host="127.0.0.1"), "engine")
        proxy = Proxy(int(port.address.rpartition(":")[2]))
        async with EngineClient(await proxy.start(), silence_s=4 * TIMEOUT_S) as client:
            news = client.generate(REQUEST)
            first = asyncio.ensure_future(anext(news))
            name = await received(port, Generate)
            assert port.send(name, token(3))
            assert (await first).tokens == (3,)
            proxy.cut()
            lost = await anext(news)
            assert lost.finish == "error"
            assert lost.error.endswith("was lost")
            # ZeroMQ connects again: a router that did not notice hears that nobody wants the rest.
            cancelled = asyncio.ensure_future(received(port, Cancel))
            while not cancelled.done():
                port.send(name, token(4))
                await asyncio.sleep(0.01)
            assert await cancelled == name
        await proxy.stop()
        links.close()

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))


def test_a_client_hears_at_once_where_another_was_closed() -> None:
    """In the same event loop, in which new sockets get the numbers of closed ones; no sign of life wakes it up here."""

    async def run() -> None:
        links = Links(None)
        port = ClientPort(links, LinkPlace(host="127.0.0.1"), "engine")
        for number in range(4):
            async with EngineClient(port.address, silence_s=4 * TIMEOUT_S) as client:
                first = asyncio.ensure_future(anext(client.generate(REQUEST)))
                name = await received(port, Generate)
                assert port.send(name, token(number))
                assert (await first).tokens == (number,)
        links.close()

    asyncio.run(asyncio.wait_for(run(), TIMEOUT_S))
