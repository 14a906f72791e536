"""Which sockets an engine uses."""

import os

import pytest

from flyray.actors.engine_links import EngineLinks
from flyray.actors.link import LinkError, ProcessPlace

HERE = ProcessPlace("a", "10.0.0.1", 1)
BESIDE = ProcessPlace("a", "10.0.0.1", 2)
FAR = ProcessPlace("b", "10.0.0.2", 3)


def test_one_node_needs_no_keys() -> None:
    chosen = EngineLinks.choose("auto", HERE, [BESIDE, BESIDE], cluster_nodes=1)
    try:
        assert chosen.shard_keys is None
        assert chosen.client_keys is None
        assert chosen.router.folder == chosen.clients.folder == chosen.place_on(BESIDE).folder
    finally:
        chosen.close()
    assert not os.path.exists(chosen.router.folder)
    chosen.close()


def test_clients_may_be_elsewhere_while_shards_are_here() -> None:
    chosen = EngineLinks.choose("auto", HERE, [BESIDE], cluster_nodes=2)
    try:
        assert chosen.shard_keys is None
        assert chosen.router.folder
        assert chosen.clients.host == HERE.host
        assert chosen.client_keys is not None
    finally:
        chosen.close()


@pytest.mark.parametrize(("transport", "shards"), [("auto", [BESIDE, FAR]), ("tcp", [BESIDE, BESIDE])])
def test_between_nodes_all_is_keyed_tcp(transport: str, shards: list[ProcessPlace]) -> None:
    chosen = EngineLinks.choose(transport, HERE, shards, cluster_nodes=2)
    assert chosen.folder is None
    assert chosen.shard_keys is not None
    assert chosen.client_keys is not None
    assert chosen.router.host == HERE.host
    assert chosen.place_on(FAR).host == FAR.host


def test_unix_sockets_between_nodes_are_refused() -> None:
    with pytest.raises(LinkError, match=r"ipc reaches one node, the engine's processes are on 2"):
        EngineLinks.choose("ipc", HERE, [FAR], cluster_nodes=2)
