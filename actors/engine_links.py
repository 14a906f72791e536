"""Which sockets an engine uses: Unix sockets where everything is on one node, else TCP with the engine's keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .link import LinkKeys, LinkPlace, ProcessPlace, needs_tcp
from .socket_folder import SocketFolder


@dataclass(frozen=True)
class EngineLinks:
    """The places and keys of one engine's sockets; keys are None for Unix sockets.

    router and clients: where the router binds its sockets for shards and for clients. folder: that of the Unix sockets,
    or None if there are none.
    """

    router: LinkPlace
    shard_keys: LinkKeys | None
    clients: LinkPlace
    client_keys: LinkKeys | None
    folder: SocketFolder | None

    @staticmethod
    def choose(transport: str, router: ProcessPlace, shards: Sequence[ProcessPlace], cluster_nodes: int) -> EngineLinks:
        """`transport` as in EngineConfig. Clients may be on any of the cluster's nodes. Makes the folder if one is
        needed; `close` removes it. Raises LinkError for a transport that cannot reach the shards."""
        shards_far = needs_tcp(transport, [router, *shards])
        clients_far = shards_far or (transport == "auto" and cluster_nodes > 1)
        folder = None if shards_far and clients_far else SocketFolder()
        keys = LinkKeys.create()
        near, far = LinkPlace(folder=folder.path) if folder else None, LinkPlace(host=router.host)
        return EngineLinks(
            router=near if near and not shards_far else far,
            shard_keys=keys if shards_far else None,
            clients=near if near and not clients_far else far,
            client_keys=keys if clients_far else None,
            folder=folder,
        )

    def reaching(self, transport: str, router: ProcessPlace, shards: Sequence[ProcessPlace]) -> EngineLinks:
        """The same for shards that have come back, perhaps on another node: clients and folder stay as they are."""
        if self.shard_keys is not None or not needs_tcp(transport, [router, *shards]):
            return self
        return replace(self, router=LinkPlace(host=router.host), shard_keys=self.client_keys or LinkKeys.create())

    def place_on(self, shard: ProcessPlace) -> LinkPlace:
        """Where a shard on that node binds its own socket."""
        return LinkPlace(host=shard.host) if self.shard_keys else self.router

    def close(self) -> None:
        """Removes the folder. May be called twice."""
        if self.folder is not None:
            self.folder.close()
