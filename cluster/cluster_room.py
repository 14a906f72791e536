"""Whether a Ray cluster can ever hold what is to be placed on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Resources = Mapping[str, float]


class NoRoom(Exception):
    """The cluster is too small; the message says for what, with the numbers."""


def bundles_in(bundle: Resources, nodes: Sequence[Resources]) -> int:
    """How many such bundles nodes of these resources can hold."""
    return sum(min(int(node.get(name, 0.0) / amount) for name, amount in bundle.items()) for node in nodes)


def check_engines(engines: int, shards: int, shard: Resources, fronts: int, nodes: Sequence[Resources]) -> None:
    """Raises NoRoom if so many engines, each of a router (1 CPU) and shards, and fronts (1 CPU) can never be there.

    A router and a front may be on any node, so what is checked is necessary; it is enough on nodes that are alike.
    """
    room = bundles_in(shard, nodes)
    if room < engines * shards:
        raise NoRoom(
            f"{_count(engines, 'engine')} of engine.shards: {shards} need {engines * shards} times "
            f"{amounts(shard)}; the cluster has room for {room} ({_each(shard, nodes)})"
        )
    cpus = fronts + engines * (1 + shards * shard.get("CPU", 0.0))
    found = sum(node.get("CPU", 0.0) for node in nodes)
    if found < cpus:
        raise NoRoom(
            f"{cpus:g} CPUs are needed, for serve.front_replicas: {fronts} and {_count(engines, 'engine')}, each with "
            f"one for the router and {shards * shard.get('CPU', 0.0):g} for shards; the cluster has {found:g}"
        )


def nodes_of_cluster() -> list[dict[str, float]] | None:
    """The resources of every node that is there, and of those that the cluster's autoscaler may add; None where it may
    add nodes of which it does not say what they have.

    Ray must be connected. Nodes that are there are counted among those to be added too: no limit is known better.
    """
    import ray
    from ray._private.state import state  # what Ray's own libraries ask; there is no public way

    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()
    for group in config.node_group_configs if config is not None else ():
        # -1: without a limit; more than there are engines of are of no use to anybody.
        count = _MOST_ADDED if group.max_count < 0 else min(group.max_count, _MOST_ADDED)
        if count and not group.resources:
            return None
        nodes += [{name: float(amount) for name, amount in group.resources.items()}] * count
    return nodes


def amounts(resources: Resources) -> str:
    """{"CPU": 8.0, "GPU": 1.0} as "8 CPU, 1 GPU"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


_MOST_ADDED = 1000


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _each(bundle: Resources, nodes: Sequence[Resources]) -> str:
    return "; ".join(amounts({name: node.get(name, 0.0) for name in bundle}) for node in nodes[:8]) or "no nodes"
