"""Collectives after a shard is lost in the middle of one: the survivors form a new group with the one in its place."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
from dataclasses import dataclass

import pytest
import torch

from flyray.actors.collective_exchange import CollectiveExchange
from flyray.actors.exchange import ExchangePoint
from flyray.actors.expert_placement import LayerPlacement
from flyray.actors.expert_routes import ExpertRoutes
from flyray.actors.link import LinkError, LinkPlace
from flyray.actors.socket_folder import SocketFolder
from flyray.kernels.protocol import ActivationFormat, Activations

SHARDS, EXPERTS, HIDDEN, ROWS = 3, 6, 8, 4
# Nothing here takes so long unless it hangs.
WAIT_S = 60.0


def serve(shard: int, folder: str, pipe: multiprocessing.connection.Connection) -> None:
    """A shard: forms a group for each epoch that it is told, then runs a layer; says what comes back, or "lost"."""
    torch.set_num_threads(1)
    routes = ExpertRoutes(shard, LayerPlacement.contiguous(EXPERTS, SHARDS), 1)
    while True:
        exchange = CollectiveExchange("engine", pipe.recv(), routes, HIDDEN, WAIT_S)
        pipe.send(exchange.open(LinkPlace(folder=folder)))
        exchange.connect(pipe.recv(), torch.device("cpu"), torch.float32)
        pipe.send("formed")
        if pipe.recv() == "wait":  # to be killed
            signal.pause()
        try:
            point, ids = ExchangePoint(0, 0, 0), torch.arange(ROWS * 2, dtype=torch.int32).view(ROWS, 2) % EXPERTS
            rows = torch.full((ROWS, HIDDEN), float(shard))
            sent = exchange.dispatch(point, Activations(ActivationFormat.FLOAT, rows, None), ids)
            received = exchange.receive_dispatch(point)
            exchange.send_back(point, received, received.activations.values[received.pair_token.long()] + 1)
            pipe.send(exchange.receive_combined(point, sent).tolist())
            exchange.close()
            return
        except LinkError:
            exchange.abort()
            pipe.send("lost")


@dataclass
class Member:
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection

    @staticmethod
    def start(shard: int, folder: str) -> Member:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["flyray.actors.collective_exchange"])
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(shard, folder, there), daemon=True)
        process.start()
        there.close()
        return Member(process, here)

    def heard(self) -> object:
        assert self.pipe.poll(WAIT_S), "a shard hangs"
        return self.pipe.recv()


def form(members: list[Member], epoch: int) -> None:
    for member in members:
        member.pipe.send(epoch)
    addresses = [member.heard() for member in members]
    for member in members:
        member.pipe.send(addresses)
    assert [member.heard() for member in members] == ["formed"] * SHARDS


@pytest.mark.parametrize("lost", [0, 2], ids=["who serves the store", "another"])
def test_survivors_form_a_new_group(lost: int) -> None:
    with SocketFolder() as folder:
        members = [Member.start(shard, folder) for shard in range(SHARDS)]
        form(members, epoch=0)
        for shard, member in enumerate(members):
            member.pipe.send("wait" if shard == lost else "run")
        assert members[lost].process.pid is not None
        os.kill(members[lost].process.pid, signal.SIGKILL)
        survivors = [member for shard, member in enumerate(members) if shard != lost]
        assert [member.heard() for member in survivors] == ["lost"] * (SHARDS - 1)
        members[lost] = Member.start(lost, folder)
        form(members, epoch=1)
        for member in members:
            member.pipe.send("run")
        for shard, member in enumerate(members):
            assert member.heard() == [[[shard + 1.0] * HIDDEN] * 2] * ROWS
            member.process.join(WAIT_S)
