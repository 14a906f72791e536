"""What an engine does when something is wrong or dies: an error that names it, nothing hangs, nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from server_process import until
from tiny_checkpoint import write_tiny
from tiny_engine import PATIENCE_S, Answer, answer, answers, greedy, process_is_gone, run, tiny_config

from flyray.actors.checkpoint import CheckpointError
from flyray.actors.link import LinkKeys
from flyray.actors.request import Generate
from flyray.cluster.engine import (
    Engine,
    EngineClient,
    EngineError,
    EngineUnreachable,
    PlacementError,
    check_room,
)
from flyray.cluster.processes import descendants

pytestmark = pytest.mark.usefixtures("local_cluster")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test ends without the shards and socket folders that it made."""
    with tempfile.TemporaryDirectory(prefix="fr-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield
        assert os.listdir(folder) == []
        assert shard_processes() == set()


def shard_processes() -> set[int]:
    """Processes under this one that run as shards."""
    found = set()
    for pid in descendants():
        try:
            if b"ShardActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
        except OSError:
            continue  # it ended while we looked
    return {pid for pid in found if not process_is_gone(pid)}


def long_requests() -> list[Generate]:
    """They run for many seconds: some do still, whatever a busy machine does before the engine is to fail."""
    return [greedy(f"request {number}", 10 + number % 4, 400) for number in range(64)]


async def some_run(client: EngineClient) -> None:
    while not (await client.status()).running:
        pass


def unfinished(found: dict[str, Answer]) -> set[tuple[str, str]]:
    """How those ended that did not come to their end: `finish` and `error`."""
    return {(each.finish, each.error) for each in found.values()} - {("length", "")}


async def break_while_running(engine: Engine, sent: signal.Signals) -> tuple[set[tuple[str, str]], Answer]:
    """Sends shard 1 a signal while requests run; returns how they ended, and what a request after that gives."""
    async with EngineClient(engine.address, engine.keys) as client:
        waiting = asyncio.create_task(answers(client, long_requests()))
        first = client.generate(greedy("first", 3, 400))
        await anext(first)
        os.kill(engine.router.local_pids[1], sent)
        found = await waiting
        async for _ in first:
            pass
        later = await answer(client, greedy("later", 3))
        status = await client.status()
        assert (status.ready, status.error) == (False, engine.error)
        assert (status.running, status.waiting) == (0, 0)
        return unfinished(found), later


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_killed_shard_ends_all_requests_at_once(checkpoint: Path, transport: str) -> None:
    """At once: the deadline of its step is longer than the test."""
    with Engine(tiny_config(checkpoint, shards=2, transport=transport, step_timeout_s=1000.0)) as engine:
        found, later = run(break_while_running(engine, signal.SIGKILL))
        expected = ("error", "shard 1 is gone: its connection closed")
        assert (found, (later.finish, later.error)) == ({expected}, expected)


def test_a_shard_that_stands_still_misses_the_deadline(checkpoint: Path) -> None:
    with Engine(tiny_config(checkpoint, shards=2, step_timeout_s=5.0)) as engine:
        pid = engine.router.local_pids[1]
        found, later = run(break_while_running(engine, signal.SIGSTOP))
        os.kill(pid, signal.SIGCONT)
        for finish, error in (*found, (later.finish, later.error)):
            assert finish == "error"
            assert "shard 1" in error
            assert "within 5 s" in error


def test_a_silent_shard_is_noticed_over_tcp_before_the_deadline(checkpoint: Path) -> None:
    config = tiny_config(checkpoint, shards=2, transport="tcp", step_timeout_s=1000.0, silence_s=4.0)
    with Engine(config) as engine:
        pid = engine.router.local_pids[1]
        found, _ = run(break_while_running(engine, signal.SIGSTOP))
        os.kill(pid, signal.SIGCONT)
        assert found == {("error", "shard 1 is gone: its connection closed")}


def test_stopping_ends_what_runs_and_may_be_repeated(checkpoint: Path) -> None:
    engine = Engine(tiny_config(checkpoint, shards=2)).start()

    async def ask() -> dict[str, Answer]:
        async with EngineClient(engine.address, engine.keys) as client:
            waiting = asyncio.create_task(answers(client, long_requests()))
            await some_run(client)
            await asyncio.to_thread(engine.stop)
            return await waiting

    assert unfinished(run(ask())) == {("error", "the engine was stopped")}
    engine.stop()
    assert engine.error == "the engine was stopped"


@ray.remote(num_cpus=1)
class Owner:
    """A process that owns an engine, as a Serve replica does: in the first bundle of a placement group."""

    def start(self, config: Any) -> tuple[str, tuple[int, ...], int]:
        self._engine = Engine(config).start()
        return self._engine.address, self._engine.router.local_pids, os.getpid()


@contextmanager
def owner_in_group(bundles: int) -> Iterator[Any]:
    """An Owner in a placement group of so many bundles of a CPU."""
    group = placement_group([{"CPU": 1.0}] * bundles)
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
    actor: Any = Owner
    owner = actor.options(scheduling_strategy=strategy).remote()
    try:
        yield owner
    finally:
        ray.kill(owner)
        remove_placement_group(group)


def test_a_group_without_a_bundle_for_each_shard_is_refused(checkpoint: Path) -> None:
    with (
        owner_in_group(2) as owner,
        pytest.raises(PlacementError, match="placement_group_bundles: 2 bundles of 1 CPU are needed after"),
    ):
        ray.get(owner.start.remote(tiny_config(checkpoint, shards=2)))


def test_when_the_owner_dies_shards_and_sockets_go_and_clients_hear_it(checkpoint: Path) -> None:
    with owner_in_group(3) as owner:
        kill_owner_while_running(owner, checkpoint)


def kill_owner_while_running(owner: Any, checkpoint: Path) -> None:
    address, shards, pid = ray.get(owner.start.remote(tiny_config(checkpoint, shards=2)))

    async def ask() -> dict[str, Answer]:
        async with EngineClient(address, silence_s=PATIENCE_S) as client:
            waiting = asyncio.create_task(answers(client, long_requests()))
            await some_run(client)
            os.kill(pid, signal.SIGKILL)
            found = await waiting
        async with EngineClient(address, silence_s=0.5) as late:
            with pytest.raises(EngineUnreachable, match="does not answer"):
                await late.status()
        return found

    assert unfinished(run(ask())) == {("error", f"the connection to the engine at {address} was lost")}
    until(lambda: all(map(process_is_gone, shards)), "shards outlive their owner")
    folder = os.path.dirname(address.removeprefix("ipc://"))
    until(lambda: not os.path.exists(folder), "sockets outlive their owner")


def test_a_client_with_foreign_keys_is_not_heard(checkpoint: Path) -> None:
    with Engine(tiny_config(checkpoint, transport="tcp")) as engine:

        async def ask(keys: LinkKeys | None, silence_s: float) -> Answer:
            async with EngineClient(engine.address, keys, silence_s) as client:
                return await answer(client, greedy("mine", 3))

        assert "does not answer" in run(ask(LinkKeys.create().for_client(), 0.5)).error
        assert "does not answer" in run(ask(None, 0.5)).error
        assert run(ask(engine.keys, PATIENCE_S)).finish == "length"


@pytest.mark.parametrize("missing", ["self_attn.o_proj.weight", "mlp.experts.5.up_proj.weight_scale"])
def test_a_missing_tensor_is_named_before_anything_starts(tmp_path: Path, missing: str) -> None:
    broken = write_tiny(tmp_path / "broken", without=f"model.layers.2.{missing}")
    with pytest.raises(CheckpointError, match=f"model.layers.2.{missing.rsplit('.', 1)[0]}"):
        Engine(tiny_config(broken, shards=2))


def test_a_missing_field_is_named_with_its_file(tmp_path: Path) -> None:
    file = write_tiny(tmp_path / "broken") / "config.json"
    file.write_text(file.read_text().replace('"kv_lora_rank"', '"kv_rank"'))
    with pytest.raises(ValueError, match=r"broken/config\.json: \S*kv_lora_rank: missing; expected an integer"):
        Engine(tiny_config(file.parent))


def test_a_file_that_goes_while_the_engine_starts_is_named(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "going")
    engine = Engine(tiny_config(path, shards=2))
    os.rename(path / "model.safetensors", path / "gone")
    with pytest.raises((EngineError, CheckpointError), match="safetensors"):
        engine.start()
    with pytest.raises(EngineError, match="not been started"):
        _ = Engine(tiny_config(write_tiny(tmp_path / "whole"))).address


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shards": 9}, "9 shards cannot share 8 experts"),
        ({"context_length": 513}, "context_length: 513 is more than the model's max_position_embeddings, 512"),
        ({"kv_pages": 0, "kv_memory_bytes": 100}, "kv_memory_bytes: 100 holds no page"),
        ({"precision": "w8a8-fp8"}, "precision 'w8a8-fp8' cannot be loaded from a w4a16 checkpoint"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    checkpoint: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        Engine(tiny_config(checkpoint, **changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shards": 0}, "shards: 0 is less than 1"),
        ({"backend": "cuda"}, "backend: 'cuda' is none of"),
        ({"transport": "smoke"}, "transport: 'smoke' is none of"),
        ({"step_timeout_s": 0.0}, "step_timeout_s"),
        ({"gpu_memory_utilization": 0.5}, "gpu_memory_utilization: 0.5, but the backend 'cpu' runs on CPUs"),
        ({"backend": "torch", "gpu_memory_utilization": 1.0}, "gpu_memory_utilization: 1 is not a part"),
        ({"backend": "torch", "gpu_memory_utilization": 0.5}, "0.5, but kv_pages or kv_memory_bytes says"),
        ({"model_path": ""}, "model_path: empty"),
    ],
)
def test_a_wrong_field_is_named(checkpoint: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(checkpoint, **changes)


def test_a_cluster_without_room_is_an_error_with_numbers(checkpoint: Path) -> None:
    with pytest.raises(PlacementError, match="5 shards of 1 CPU each do not fit the cluster, which has room for 4"):
        Engine(tiny_config(checkpoint, shards=5)).start()
    with pytest.raises(PlacementError, match="2 shards of 99 CPU each do not fit"):
        Engine(tiny_config(checkpoint, shards=2, threads_per_shard=99)).start()


def test_a_busy_cluster_is_an_error_after_a_while(checkpoint: Path) -> None:
    late = Engine(tiny_config(checkpoint, shards=3, placement_timeout_s=0.3))
    with (
        Engine(tiny_config(checkpoint, shards=2)),
        pytest.raises(PlacementError, match=r"no free room within 0.3 s; the cluster has \d CPU free"),
    ):
        late.start()


def test_a_gpu_s_memory_decides_on_the_pages_unless_the_configuration_does(checkpoint: Path) -> None:
    config = tiny_config(checkpoint, backend="torch", kv_pages=0, context_length=100)
    assert config.kv_memory_share == 0.9
    shape = Engine(config).shape
    assert shape.kv_pages == 64 * 13  # more than 64 sequences of 100 tokens in pages of 8 cannot fill
    assert shape.with_pages((70, 50)).longest_sequence(config) == 100
    assert shape.with_pages((70, 10)).longest_sequence(config) == 80
    assert replace(config, kv_memory_bytes=1 << 20).kv_memory_share == 0.0
    assert any("torch.experts" in line for line in shape.precision_plan)


def test_room_is_counted_node_by_node(checkpoint: Path) -> None:
    bundle = tiny_config(checkpoint, threads_per_shard=3).shard_bundle
    assert bundle == {"CPU": 3.0}
    assert tiny_config(checkpoint, backend="torch").shard_bundle == {"CPU": 1.0, "GPU": 1.0}
    check_room(bundle, 2, [{"CPU": 4.0}, {"CPU": 5.0}])
    with pytest.raises(PlacementError, match="room for 2"):
        check_room(bundle, 3, [{"CPU": 4.0}, {"CPU": 5.0}])  # 9 CPUs, but no node has 3 left
