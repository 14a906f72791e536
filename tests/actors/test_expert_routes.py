"""Where tokens go: the shard's own replica first, else all replicas in turns; what was chosen is counted."""

import numpy as np
import pytest
import torch

from flyray.actors.expert_placement import LayerPlacement
from flyray.actors.expert_routes import ExpertRoutes

PLACEMENT = LayerPlacement(((0, 1, 4), (2, 3, 0), (4, 5, 1)))
"""Of 6 experts; 0, 1 and 4 are on two shards. A shard's slots are numbered from 0, 3 and 6 on."""


def test_slots_have_numbers_in_which_every_shard_has_as_many() -> None:
    routes = ExpertRoutes(0, LayerPlacement(((0, 1), (2,))), 1)
    assert routes.slots == (range(2), range(2, 3))
    assert routes.route(0, torch.tensor([[2, 0, 1]], dtype=torch.int32)).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        (0, [[0, 1, 2], [0, 1, 2], [3, 4, 7], [0, 1, 2]]),
        # Expert 0 is here; 1 is in slots 1 and 8, 4 in 2 and 6.
        (1, [[5, 8, 6], [5, 1, 2], [3, 4, 7], [5, 1, 2]]),
        (2, [[0, 8, 6], [5, 8, 6], [3, 4, 7], [5, 8, 6]]),
    ],
)
def test_own_replicas_come_first_and_others_take_turns(shard: int, expected: list[list[int]]) -> None:
    ids = torch.tensor([[0, 1, 4], [0, 1, 4], [2, 3, 5], [0, 1, 4]], dtype=torch.int32)
    routes = ExpertRoutes(shard, PLACEMENT, 2)
    found = routes.route(1, ids)
    assert found.dtype == torch.int32
    assert found.tolist() == expected
    assert routes.counts.tolist() == [[0] * 6, [3, 3, 1, 1, 3, 1]]
    assert np.array_equal(routes.route_array(1, ids.numpy()), found.numpy())
    assert routes.counts[1].tolist() == [6, 6, 2, 2, 6, 2]


def test_a_device_routes_as_the_host_does() -> None:
    ids = torch.tensor([[0, 1, 4], [5, 1, 2], [4, 0, 3]] * 400, dtype=torch.int32)
    for placement in (PLACEMENT, LayerPlacement.contiguous(6, 3)):
        host, device = (ExpertRoutes(1, placement, 1) for _ in range(2))
        expected = host.route_array(0, ids.numpy())
        assert np.array_equal(device._route_on_device(0, ids).numpy(), expected)
        assert torch.equal(device.counts, host.counts)


def test_experts_move_in_place() -> None:
    routes = ExpertRoutes(1, PLACEMENT, 2, moves=True)
    table = routes.table
    moved = LayerPlacement(((5, 1, 4), (2, 3, 0), (4, 0, 1)))
    routes.place(0, moved)
    assert routes.table is table
    assert (routes.placement(0), routes.placement(1)) == (moved, PLACEMENT)
    assert routes.route(0, torch.tensor([[5, 0]], dtype=torch.int32)).tolist() == [[0, 5]]
    with pytest.raises(
        ValueError, match=r"layer 0: a placement of 6 experts in \(2, 2, 2\) slots for 6 in \(3, 3, 3\)"
    ):
        routes.place(0, LayerPlacement(((0, 1), (2, 3), (4, 5))))


def test_shards_that_have_the_same_rows_agree_on_every_replica() -> None:
    ids = np.array([[0, 1, 4], [5, 1, 2], [4, 0, 3]], np.int32)
    shards = [ExpertRoutes(shard, LayerPlacement.contiguous(6, 3, 1), 1, moves=True, alike=True) for shard in range(3)]
    for routes in shards:
        routes.place(0, PLACEMENT)
    first, *others = [routes.route_array(0, ids) for routes in shards]
    assert all(np.array_equal(first, other) for other in others)
    assert len({first[0, 0], first[2, 1]}) == 1
    assert len({first[0, 1], first[1, 1]}) == 2, "rows take turns"
