"""What can never be placed is refused with its numbers; what can be placed never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.cluster_room import NoRoom, check_engines

SHARDS = st.sampled_from([{"CPU": 1.0}, {"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}])


@given(st.integers(1, 3), st.integers(1, 4), SHARDS, st.integers(1, 3), st.data())
def test_what_was_packed_is_not_refused(
    engines: int, shards: int, shard: dict[str, float], fronts: int, data: st.DataObject
) -> None:
    """Nodes made of what lies on them."""
    bundles = [{"CPU": 1.0}] * (engines + fronts) + [shard] * (engines * shards)
    count = data.draw(st.integers(1, len(bundles)))
    nodes: list[dict[str, float]] = [{} for _ in range(count)]
    for bundle in bundles:
        node = nodes[data.draw(st.integers(0, count - 1))]
        for name, amount in bundle.items():
            node[name] = node.get(name, 0.0) + amount
    check_engines(engines, shards, shard, fronts, nodes)
    richest = max(nodes, key=lambda node: node.get("CPU", 0.0))
    richest["CPU"] -= 1.0
    with pytest.raises(NoRoom):
        check_engines(engines, shards, shard, fronts, nodes)


def test_a_refusal_says_what_is_needed_and_what_there_is() -> None:
    nodes = [{"CPU": 64.0, "GPU": 4.0}, {"CPU": 64.0}]
    message = r"2 engines of engine.shards: 4 need 8 times 8 CPU, 1 GPU; .* room for 4 \(64 CPU, 4 GPU; 64 CPU, 0 GPU\)"
    with pytest.raises(NoRoom, match=message):
        check_engines(2, 4, {"CPU": 8.0, "GPU": 1.0}, 1, nodes)
    with pytest.raises(NoRoom, match=r"6 CPUs are needed, for serve.front_replicas: 1 and 1 engine, .* has 5"):
        check_engines(1, 4, {"CPU": 1.0}, 1, [{"CPU": 5.0}])
