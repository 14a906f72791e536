"""The router's loop on real sockets, with a shard and a client that the test plays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import zmq

from flyray.actors.client_port import ClientPort
from flyray.actors.engine_error import EngineError
from flyray.actors.link import LinkPlace, Links
from flyray.actors.micro_batches import MicroBatchChoice
from flyray.actors.request import Cancel, EngineStatus, Generate, StatusQuery
from flyray.actors.router_loop import RouterLoop
from flyray.actors.scheduler import Scheduler, SchedulerConfig
from flyray.actors.sequence import LayerPlan, sequence
from flyray.actors.shard_group import HELLO, ShardGroup
from flyray.actors.step_pace import StepPace
from flyray.actors.step_plan import NewTokens, Sampling, StepPlan, StepResult
from flyray.actors.wire import decode_as, encode

CONFIG = SchedulerConfig("engine", 0, 1, 8, 4, 8, 8, 32, 9, "colocated")
WAIT_S = 60.0


class WatchedCondition(threading.Condition):
    """Says when a thread is about to wait, which it does before any other gets the lock."""

    def __init__(self) -> None:
        super().__init__()
        self.waited = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waited.set()
        return super().wait(timeout)


@dataclass
class Played:
    """links: the loop's. turned: its own condition."""

    loop: RouterLoop
    links: Links
    thread: threading.Thread
    client: zmq.Socket
    shard: zmq.Socket
    turned: WatchedCondition

    def plan(self) -> StepPlan:
        assert self.shard.poll(WAIT_S * 1000)
        return decode_as(self.shard.recv(), StepPlan)

    def status(self) -> EngineStatus:
        self.client.send(encode(StatusQuery("now", 0)))
        assert self.client.poll(WAIT_S * 1000)
        return decode_as(self.client.recv(), EngineStatus)

    def answer(self, step: int) -> None:
        self.shard.send(encode(StepResult("engine", 0, step, 0, NewTokens(), (), (), "")))


@pytest.fixture
def played(socket_folder: str) -> Iterator[Played]:
    """A loop whose one shard has connected, and runs two steps of a request that was cancelled."""
    place = LinkPlace(folder=socket_folder)
    links, others = Links(None), Links(None)
    group, clients = ShardGroup(links, place, 1, "engine", 0), ClientPort(links, place, "engine")
    choice = MicroBatchChoice([sequence(LayerPlan(1, 0), "colocated", 1)], 1)
    loop = RouterLoop(Scheduler(CONFIG), group, clients, links, choice, WAIT_S, (), b"golden")
    turned = loop._turned = WatchedCondition()
    loop.ready = True
    shard, client = others.connect(zmq.DEALER, group.addresses[0]), others.connect(zmq.DEALER, clients.address)
    shard.send(encode(StepResult("engine", 0, HELLO, 0, NewTokens(), (), (), "")))
    group.await_shards(WAIT_S)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    found = Played(loop, links, thread, client, shard, turned)
    client.send(encode(Generate("long", (1,) * 20, 1, Sampling(0.0, 1.0, 0, 0), (), 0, False)))
    assert found.plan().slices
    client.send(encode(Cancel("long")))
    assert found.status().running == 0
    yield found
    if thread.is_alive():
        loop.stop()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    others.close()
    links.close()


def test_holding_waits_for_the_last_steps_and_keeps_clients_waiting(played: Played) -> None:
    def answers() -> None:
        played.turned.waited.wait(WAIT_S)
        played.answer(0)
        played.answer(1)
        while not (plan := played.plan()).ends:
            pass
        played.answer(plan.step)

    helper = threading.Thread(target=answers)
    helper.start()
    with played.loop.hold():
        played.client.send(encode(StatusQuery("now", 0)))
        assert not played.client.poll(50)
    helper.join()
    assert played.client.poll(WAIT_S * 1000)
    assert decode_as(played.client.recv(), EngineStatus).ready


def test_a_shard_lost_meanwhile_ends_the_wait_with_its_name(played: Played) -> None:
    def vanish() -> None:
        played.turned.waited.wait(WAIT_S)
        played.shard.close()

    helper = threading.Thread(target=vanish)
    helper.start()
    with pytest.raises(EngineError, match="shard 0 is gone: its connection closed"), played.loop.hold():
        pass
    helper.join()
    with pytest.raises(EngineError, match="shard 0 is gone"), played.loop.hold():
        pass


def test_a_loop_that_has_stopped_can_still_be_told_to_fail(played: Played) -> None:
    played.loop.stop()
    played.thread.join(WAIT_S)
    played.links.close()
    played.loop.fail("too late")
    assert played.loop.error == "the engine was stopped"


def test_a_loop_can_be_told_to_fail_while_it_is_stopped(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    wake = played.loop._waker.wake

    def stopped_meanwhile() -> None:
        monkeypatch.undo()
        played.loop.stop()
        played.thread.join(WAIT_S)
        played.links.close()
        wake()

    monkeypatch.setattr(played.loop._waker, "wake", stopped_meanwhile)
    played.loop.fail("a shard runs another model")
    assert played.loop.error in ("the engine was stopped", "a shard runs another model")


def paced(played: Played, seconds: float) -> None:
    """Ends what runs; from then on steps of eight tokens are taken to last so long."""
    played.answer(0)
    while not (plan := played.plan()).ends:
        played.answer(plan.step)
    played.answer(plan.step)
    with played.loop.hold():
        played.loop._sent._pace = StepPace()
        played.loop._sent._pace.took(8, seconds)
    played.client.send(encode(Generate("first", (2,) * 12, 1, Sampling(0.0, 1.0, 0, 0), (), 0, False)))


def test_a_request_that_comes_while_a_step_runs_is_in_the_next_one(played: Played) -> None:
    paced(played, 4 * WAIT_S)
    running = played.plan()  # eight tokens of the prompt
    played.client.send(encode(Generate("second", (1,), 1, Sampling(0.0, 1.0, 0, 0), (), 0, False)))
    assert played.status().running == 1  # the second waits for the next plan
    played.answer(running.step)
    assert {part.sequence for part in played.plan().slices} == {1, 2}


def test_the_next_plan_leaves_before_the_running_step_ends(played: Played) -> None:
    paced(played, 0.2)
    running = played.plan()
    assert played.plan().step == running.step + 1  # though the first has no answer
