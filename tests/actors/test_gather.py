"""Shards that have all rows put together what each has computed, over ZeroMQ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from flyray.actors.exchange import ExchangePoint
from flyray.actors.expert_placement import LayerPlacement
from flyray.actors.expert_routes import ExpertRoutes
from flyray.actors.gather import PartColumns
from flyray.actors.link import LinkError, LinkPlace, Links
from flyray.actors.zmq_gather import ZmqGather
from flyray.kernels.protocol import ActivationFormat, Activations

SHARDS, EXPERTS, HIDDEN, TOP_K = 3, 8, 5, 3
COLUMNS = PartColumns(heads=(4, 3, 2), logits=(6, 5, 5))
POINT = ExchangePoint(0, 1, 0)
TIMEOUT_S = 60.0  # nothing here takes so long unless it hangs


@dataclass
class Group:
    """All shards in this thread: what one sends waits for the others."""

    gathers: list[ZmqGather]
    routes: list[ExpertRoutes]


@pytest.fixture
def group(socket_folder: str) -> Iterator[Group]:
    links = [Links(None) for _ in range(SHARDS)]
    placement = LayerPlacement.contiguous(EXPERTS, SHARDS, redundant=2)
    routes = [ExpertRoutes(shard, placement, 2, alike=True) for shard in range(SHARDS)]
    gathers = [ZmqGather("engine", 7, each, HIDDEN, TIMEOUT_S, COLUMNS) for each in routes]
    place = LinkPlace(folder=socket_folder)
    addresses = [each.open(own, place) for each, own in zip(gathers, links, strict=True)]
    for each, own in zip(gathers, links, strict=True):
        each.connect(own, addresses)
    yield Group(gathers, routes)
    for own in links:
        own.close()


def part(whole: torch.Tensor, shard: int, widths: tuple[int, ...]) -> torch.Tensor:
    begin = sum(widths[:shard])
    return whole[:, begin : begin + widths[shard]]


def test_columns_stand_side_by_side_in_the_order_of_sending(group: Group) -> None:
    first, second = torch.rand(7, 16), torch.rand(2, 16)
    for whole in (first, second):
        for shard, gather in enumerate(group.gathers[1:], 1):
            gather.send_part(POINT, "logits", part(whole, shard, COLUMNS.logits))
    for whole in (first, second):
        group.gathers[0].send_part(POINT, "logits", part(whole, 0, COLUMNS.logits))
        assert torch.equal(group.gathers[0].receive_whole(POINT, "logits"), whole)


@pytest.mark.parametrize("tokens", [1, 13])
def test_every_pair_is_run_by_one_shard_and_known_to_all(group: Group, tokens: int) -> None:
    ids = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.to(torch.int32)
    rows = Activations(ActivationFormat.FLOAT, torch.rand(tokens, HIDDEN), None)
    expected = rows.values[:, None, :] * (1 + ids[:, :, None])
    sent, count = [], 0
    for gather, routes in zip(group.gathers, group.routes, strict=True):
        own = gather.own_pairs(POINT, rows, ids)
        held = torch.tensor(routes.placement(1).held[routes.shard])
        outputs = own.activations.values[own.pair_token.long()] * (1 + held[own.pair_expert.long()][:, None])
        sent.append(gather.send_outputs(POINT, own, outputs))
        count += len(outputs)
    assert count == ids.numel()
    for gather, each in zip(group.gathers, sent, strict=True):
        assert torch.equal(gather.receive_combined(POINT, each), expected)
        assert gather.dropped == 0


def test_a_replica_is_the_same_for_all_shards(group: Group) -> None:
    ids = torch.arange(EXPERTS, dtype=torch.int32).repeat(24, 1).numpy()
    found = [routes.route_array(0, ids) for routes in group.routes]
    assert all(np.array_equal(each, found[0]) for each in found)
    shares = np.bincount(np.searchsorted([0, 5, 10], found[0].ravel(), side="right") - 1)
    assert shares.min() > 0.6 * shares.max(), "replicas share the rows"


def test_what_does_not_fit_is_refused(group: Group) -> None:
    first, second, third = group.gathers
    second.send_part(POINT, "heads", torch.zeros(2, 4))  # as many columns as the first shard's
    third.send_part(POINT, "heads", torch.zeros(2, 2))
    first.send_part(POINT, "heads", torch.zeros(3, 4))
    second.send_part(POINT, "heads", torch.zeros(3, 3))
    with pytest.raises(LinkError, match="layer 1: shard 2 sent the heads of 2 rows, there are 3"):
        first.receive_whole(POINT, "heads")
    assert first.dropped == 1, "and waited for the next one of shard 1"
    second.send_outputs(POINT, second.own_pairs(POINT, *_rows()), torch.zeros(0, HIDDEN))
    first.begin_step(1)
    assert first.dropped == 1


def _rows() -> tuple[Activations, torch.Tensor]:
    return Activations(ActivationFormat.FLOAT, torch.zeros(0, HIDDEN), None), torch.zeros(0, TOP_K, dtype=torch.int32)
