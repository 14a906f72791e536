"""Dispatch and combine: one shard against several real processes, equal to the bit."""

from __future__ import annotations

import multiprocessing
import random
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
import zmq
from torch import Tensor

from flyray.actors.collective_exchange import CollectiveExchange
from flyray.actors.collective_gather import CollectiveGather
from flyray.actors.engine_config import expert_ranges
from flyray.actors.exchange import Exchange, ExchangePoint, LocalExchange, Received
from flyray.actors.expert_placement import LayerPlacement
from flyray.actors.expert_routes import ExpertRoutes
from flyray.actors.gather import Gather, PartColumns
from flyray.actors.link import LinkError, LinkKeys, LinkPlace, Links
from flyray.actors.socket_folder import SocketFolder
from flyray.actors.wire import encode
from flyray.actors.zmq_exchange import ZmqExchange
from flyray.actors.zmq_mail import ExchangeHeader
from flyray.kernels.protocol import (
    ActivationFormat,
    Activations,
    Bf16Matrix,
    ExpertMatrix,
    ExpertWeights,
    Fp8Matrix,
    Int4Matrix,
)
from flyray.kernels.select import select_kernels
from flyray.kernels.selfcheck import random_matrix

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 24, 64, 32, 4
REDUNDANT, LAYERS = 2, 4
KINDS: dict[ActivationFormat, type[ExpertMatrix]] = {
    ActivationFormat.FLOAT: Bf16Matrix,
    ActivationFormat.INT8: Int4Matrix,
    ActivationFormat.FP8: Fp8Matrix,
}
# Nothing here takes so long unless it hangs.
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Case:
    """Rows of one layer on one shard."""

    activations: Activations
    ids: Tensor


def case(seed: int, tokens: int, format: ActivationFormat = ActivationFormat.INT8) -> Case:
    """Random rows that each choose TOP_K different experts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((tokens, EXPERTS), generator=generator).topk(TOP_K).indices.to(torch.int32)
    rows = torch.randn((tokens, HIDDEN), generator=generator)
    if format is ActivationFormat.FLOAT:
        return Case(Activations(format, rows, None), ids)
    scale = rows.abs().amax(1) / (127 if format is ActivationFormat.INT8 else 448)
    values = rows / scale[:, None]
    values = values.round() if format is ActivationFormat.INT8 else values
    kind = torch.int8 if format is ActivationFormat.INT8 else torch.float8_e4m3fn
    return Case(Activations(format, values.to(kind), scale), ids)


def routes(shard: int, shards: int) -> ExpertRoutes:
    """With REDUNDANT slots on each shard, to be moved."""
    return ExpertRoutes(shard, LayerPlacement.contiguous(EXPERTS, shards, REDUNDANT), LAYERS, moves=True)


class Experts:
    """The routed experts `held`, of random weights that are the same everywhere, in each activation format."""

    def __init__(self, held: Sequence[int]) -> None:
        self._kernels = select_kernels("cpu", 1)
        self._weights = {format: self._of(kind, held) for format, kind in KINDS.items()}

    def run(self, received: Received) -> Tensor:
        weights = self._weights[received.activations.format]
        outputs = torch.full((len(received.pair_token), HIDDEN), torch.nan)
        here = received.pair_expert >= 0
        if bool(here.any()):
            pairs = received.pair_token[here], received.pair_expert[here]
            outputs[here] = self._kernels.experts(received.activations, *pairs, weights)
        return outputs

    @staticmethod
    def _of(kind: type[ExpertMatrix], held: Sequence[int]) -> ExpertWeights:
        generator = torch.Generator().manual_seed(1)
        gate_up = random_matrix(kind, EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator)
        down = random_matrix(kind, EXPERTS, HIDDEN, INTERMEDIATE, generator)

        def part(matrix: ExpertMatrix) -> ExpertMatrix:
            return type(matrix)(**{name: values[list(held)] for name, values in vars(matrix).items()})

        return ExpertWeights(part(gate_up), part(down))


def run_layer(exchange: Exchange, point: ExchangePoint, case: Case, experts: Experts) -> Tensor:
    """One layer as a shard runs it -> slots [T, K, D]."""
    sent = exchange.dispatch(point, case.activations, case.ids)
    received = exchange.receive_dispatch(point)
    exchange.send_back(point, received, experts.run(received))
    return exchange.receive_combined(point, sent)


COLUMNS = PartColumns(heads=(HIDDEN - 40, 31, 9), logits=(1, 1, 1))


def gather_layer(gather: Gather, shard: int, point: ExchangePoint, case: Case, experts: Experts) -> Tensor:
    """One layer as a shard runs it that has all rows, as all shards have -> slots [T, K, D]."""
    rows, begin = case.activations.values.float(), sum(COLUMNS.heads[:shard])
    gather.send_part(point, "heads", rows[:, begin : begin + COLUMNS.heads[shard]])
    received = gather.own_pairs(point, case.activations, case.ids)
    sent = gather.send_outputs(point, received, experts.run(received))
    assert torch.equal(gather.receive_whole(point, "heads"), rows)
    return gather.receive_combined(point, sent)


def serve_shard(
    shard: int, shards: int, place: LinkPlace, keys: LinkKeys | None, pipe: Connection, collective: bool
) -> None:
    """A shard's process: answers each list of cases (one a layer) with the slots of each."""
    torch.set_num_threads(1)
    mine = routes(shard, shards)
    links, experts = Links(keys), Experts(mine.placement(0).held[shard])
    exchange: Exchange
    if collective:
        exchange = CollectiveExchange("engine", 7, mine, HIDDEN, TIMEOUT_S)
        pipe.send(exchange.open(place))
        exchange.connect(pipe.recv(), torch.device("cpu"), torch.float32)
    else:
        exchange = ZmqExchange("engine", 7, mine, HIDDEN, TIMEOUT_S)
        pipe.send(exchange.open(links, place))
        exchange.connect(links, pipe.recv())
    step = 0
    while (asked := pipe.recv()) is not None:
        cases, fixed, placement = asked
        if placement is not None:
            for layer in range(LAYERS):
                mine.place(layer, placement)
            experts = Experts(placement.held[shard])
        points = [ExchangePoint(step, layer, 0) for layer in range(len(cases))]
        if fixed in ("gathered", "gathered by kernels that leave out"):
            alike = ExpertRoutes(shard, mine.placement(0), LAYERS, moves=True, alike=True)
            gather = CollectiveGather(alike, COLUMNS, leaves_out=fixed != "gathered")
            gather.begin_step(step)
            slots = [gather_layer(gather, shard, *each, experts) for each in zip(points, cases, strict=True)]
        else:
            if fixed:
                assert isinstance(exchange, CollectiveExchange)
                used: Exchange = exchange.fixed(64, TOP_K)
            else:
                used = exchange
            used.begin_step(step)
            slots = [run_layer(used, *each, experts) for each in zip(points, cases, strict=True)]
        pipe.send(([each.numpy() for each in slots], exchange.dropped))
        step += 1
    if isinstance(exchange, CollectiveExchange):
        exchange.close()
    links.close()


class Group:
    """Shards in processes of their own."""

    def __init__(self, shards: int, place: LinkPlace, keys: LinkKeys | None, collective: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        # Torch is imported once, not by every shard.
        context.set_forkserver_preload(
            ["flyray.actors.collective_exchange", "flyray.actors.zmq_exchange", "flyray.kernels.cpu.backend"]
        )
        self.pipes, self.processes = [], []
        for shard in range(shards):
            here, there = context.Pipe()
            arguments = shard, shards, place, keys, there, collective
            process = context.Process(target=serve_shard, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        self.addresses = [pipe.recv() for pipe in self.pipes]
        for pipe in self.pipes:
            pipe.send(self.addresses)

    def run(
        self, cases: Sequence[Sequence[Case]], fixed: str = "", placement: LayerPlacement | None = None
    ) -> tuple[list[list[np.ndarray]], list[int]]:
        """cases[shard][layer] -> slots[shard][layer] and the dropped messages of each shard. fixed: "fixed": all have
        as many rows, "gathered": all have the same; else "". placement: from now on."""
        for pipe, mine in zip(self.pipes, cases, strict=True):
            pipe.send((mine, fixed, placement))
        answers = [pipe.recv() for pipe in self.pipes]
        return [slots for slots, _ in answers], [dropped for _, dropped in answers]

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
            assert process.exitcode == 0


@pytest.fixture(scope="module", params=[(3, "tcp"), (5, "ipc"), (3, "gloo")], ids=["3-tcp", "5-ipc", "3-gloo"])
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    shards, transport = request.param
    keys = LinkKeys.create() if transport == "tcp" else None
    with SocketFolder() as folder:
        place = LinkPlace(host="127.0.0.1") if transport == "tcp" else LinkPlace(folder=folder)
        group = Group(shards, place, keys, transport == "gloo")
        yield group
        group.stop()


def split(whole: Case, parts: Sequence[int]) -> list[Case]:
    """The rows of a case, `parts[shard]` of them on each shard."""
    cases, begin = [], 0
    for count in parts:
        rows = slice(begin, begin + count)
        scale = whole.activations.scale
        mine = Activations(
            whole.activations.format, whole.activations.values[rows], None if scale is None else scale[rows]
        )
        cases.append(Case(mine, whole.ids[rows]))
        begin += count
    return cases


def moved(shards: int, seed: int) -> LayerPlacement:
    """Any other placement in as many slots: every expert once, then more of them, at random."""
    choice = random.Random(seed)
    sizes = LayerPlacement.contiguous(EXPERTS, shards, REDUNDANT).sizes
    order = choice.sample(range(EXPERTS), EXPERTS)
    held = [[order.pop() for _ in range(size - REDUNDANT)] for size in sizes]
    for each in held:
        each += choice.sample(sorted(set(range(EXPERTS)) - set(each)), REDUNDANT)
        choice.shuffle(each)
    return LayerPlacement(tuple(map(tuple, held)))


@pytest.mark.parametrize("format", list(ActivationFormat))
def test_any_number_of_shards_gives_the_bits_of_one(group: Group, format: ActivationFormat) -> None:
    shards = len(group.pipes)
    layers = [case(layer, tokens, format) for layer, tokens in enumerate((17, 1, 40, 5))]
    experts = Experts(range(EXPERTS))
    expected = [run_layer(LocalExchange(), ExchangePoint(0, 0, 0), each, experts) for each in layers]
    # All rows on the last shard, then dealt out unevenly, with shards that have none, then with other experts there.
    for deal, placement in (("last", None), ("uneven", None), ("uneven", moved(shards, 1)), ("last", moved(shards, 2))):
        shares = []
        for each in layers:
            tokens = len(each.ids)
            first = 0 if deal == "last" else tokens // 2
            shares.append(split(each, [first] + [0] * (shards - 2) + [tokens - first]))
        cases = [[share[shard] for share in shares] for shard in range(shards)]
        slots, dropped = group.run(cases, placement=placement)
        assert dropped == [0] * shards
        for layer, whole in enumerate(expected):
            joined = np.concatenate([slots[shard][layer] for shard in range(shards)])
            assert np.array_equal(joined.view(np.int32), whole.numpy().view(np.int32))


@pytest.mark.parametrize("group", [(3, "gloo")], ids=["3-gloo"], indirect=True)
@pytest.mark.parametrize("format", list(ActivationFormat))
def test_shards_with_as_many_rows_each_give_the_bits_of_one(group: Group, format: ActivationFormat) -> None:
    shards = len(group.pipes)
    layers = [case(layer, shards * tokens, format) for layer, tokens in enumerate((1, 9, 4))]
    experts = Experts(range(EXPERTS))
    shares = [split(each, [len(each.ids) // shards] * shards) for each in layers]
    for placement in (None, moved(shards, 3)):
        cases = [[share[shard] for share in shares] for shard in range(shards)]
        slots, _ = group.run(cases, fixed="fixed", placement=placement)
        for layer, each in enumerate(layers):
            whole = run_layer(LocalExchange(), ExchangePoint(0, 0, 0), each, experts).numpy()
            joined = np.concatenate([slots[shard][layer] for shard in range(shards)])
            assert np.array_equal(joined.view(np.int32), whole.view(np.int32))


@pytest.mark.parametrize("group", [(3, "gloo")], ids=["3-gloo"], indirect=True)
@pytest.mark.parametrize("way", ["gathered", "gathered by kernels that leave out"])
def test_shards_with_the_same_rows_give_the_bits_of_one(group: Group, way: str) -> None:
    """With experts on several shards, of which one runs each pair."""
    layers = [case(layer, tokens) for layer, tokens in enumerate((1, 9, 40))]
    experts = Experts(range(EXPERTS))
    slots, _ = group.run([layers] * 3, fixed=way)
    for layer, each in enumerate(layers):
        whole = run_layer(LocalExchange(), ExchangePoint(0, 0, 0), each, experts).numpy()
        for shard in range(3):
            assert np.array_equal(slots[shard][layer].view(np.int32), whole.view(np.int32))


def test_messages_of_another_epoch_or_engine_or_none_are_dropped_and_counted(socket_folder: str) -> None:
    links = Links(None)
    try:
        exchange = ZmqExchange("engine", 7, routes(0, 2), HIDDEN, TIMEOUT_S)
        address = exchange.open(links, LinkPlace(folder=socket_folder))
        exchange.connect(links, [address, f"ipc://{socket_folder}/nobody"])
        peer = links.connect(zmq.PUSH, address)
        point, good = ExchangePoint(0, 0, 0), ExchangeHeader("engine", 7, 0, 0, 0, "dispatch", 1, 0, 0, HIDDEN, "int8")
        strange = [
            replace(good, epoch=6),
            replace(good, engine="other"),
            replace(good, sender=5),
            replace(good, columns=HIDDEN + 1),
            replace(good, phase="gossip"),
            replace(good, format="int3"),
            replace(good, rows=1),
            replace(good, rows=-1, pairs=-1),
        ]
        for header in strange:
            peer.send(as_message(header))
        broken = [b"", b"\x01", b"\xff\xff\xc1 not msgpack", as_message(good, b"too much")]
        for message in broken:
            peer.send(message)
        peer.send(as_message(good))  # what is sent first comes first
        exchange.dispatch(point, *_none())
        assert exchange.receive_dispatch(point).pairs == (0, 0)
        assert exchange.dropped == len(strange) + len(broken)
    finally:
        links.close()


def test_a_silent_peer_is_named(socket_folder: str) -> None:
    links, point = Links(None), ExchangePoint(0, 3, 0)
    try:
        exchange = ZmqExchange("engine", 7, routes(0, 2), HIDDEN, 0.01)
        exchange.connect(
            links, [exchange.open(links, LinkPlace(folder=socket_folder)), f"ipc://{socket_folder}/nobody"]
        )
        exchange.dispatch(point, *_none())
        with pytest.raises(LinkError, match=r"layer 3: no dispatch message from shard 1 within 0.01 s"):
            exchange.receive_dispatch(point)
    finally:
        links.close()


def test_a_shard_without_tokens_keeps_no_outputs_that_it_computed_for_others(socket_folder: str) -> None:
    links = [Links(None), Links(None)]
    try:
        busy, idle = (ZmqExchange("engine", 7, routes(shard, 2), HIDDEN, TIMEOUT_S) for shard in range(2))
        addresses = [
            each.open(own, LinkPlace(folder=socket_folder)) for each, own in zip((busy, idle), links, strict=True)
        ]
        for each, own in zip((busy, idle), links, strict=True):
            each.connect(own, addresses)
        point, rows = ExchangePoint(0, 0, 0), case(0, 9)
        sent = busy.dispatch(point, rows.activations, rows.ids)
        idle.dispatch(point, *_none())
        received = idle.receive_dispatch(point)
        outputs = torch.ones(len(received.pair_token), HIDDEN)
        kept = weakref.ref(outputs)
        idle.send_back(point, received, outputs)  # and never `receive_combined`: it has nothing to combine
        del outputs
        assert kept() is None
        own = busy.receive_dispatch(point)
        busy.send_back(point, own, torch.ones(len(own.pair_token), HIDDEN))
        assert bool((busy.receive_combined(point, sent) == 1).all())
    finally:
        for each in links:
            each.close()


def as_message(header: ExchangeHeader, payload: bytes = b"") -> bytes:
    begin = encode(header)
    return len(begin).to_bytes(2, "little") + begin + payload


def _none() -> tuple[Activations, Tensor]:
    empty = case(0, 0)
    return empty.activations, empty.ids


def test_pairs_that_name_no_expert_of_this_shard_are_refused(socket_folder: str) -> None:
    links = Links(None)
    try:
        exchange = ZmqExchange("engine", 7, routes(0, 2), HIDDEN, TIMEOUT_S)
        address = exchange.open(links, LinkPlace(folder=socket_folder))
        exchange.connect(links, [address, f"ipc://{socket_folder}/nobody"])
        peer = links.connect(zmq.PUSH, address)
        header = ExchangeHeader("engine", 7, 0, 0, 0, "dispatch", 1, 1, 1, HIDDEN, "int8")
        numbers = np.array([0], np.int32), np.array([EXPERTS // 2 + REDUNDANT], np.int32)
        peer.send(as_message(header, bytes(4) + b"".join(each.tobytes() for each in numbers) + bytes(HIDDEN)))
        exchange.dispatch(ExchangePoint(0, 0, 0), *_none())
        with pytest.raises(LinkError, match="shard 1 sent pairs of layer 0 that name no row or expert here"):
            exchange.receive_dispatch(ExchangePoint(0, 0, 0))
    finally:
        links.close()


@pytest.mark.parametrize(("experts", "shards"), [(24, 1), (24, 5), (8, 3), (384, 3), (8, 8)])
def test_every_expert_is_held_once_and_shares_differ_by_one_at_most(experts: int, shards: int) -> None:
    ranges = expert_ranges(experts, shards)
    assert [expert for held in ranges for expert in held] == list(range(experts))
    sizes = [len(held) for held in ranges]
    assert len(sizes) == shards
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_more_shards_than_experts_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="9 shards cannot share 8 experts"):
        expert_ranges(8, 9)
