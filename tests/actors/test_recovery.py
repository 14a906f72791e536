"""How often shards may be lost."""

from __future__ import annotations

import pytest

from flyray.actors.engine_error import EngineError
from flyray.actors.recovery import WINDOW_S, Restarts


def test_a_shard_may_be_lost_so_often_within_the_window() -> None:
    now = 0.0
    restarts = Restarts(2, clock=lambda: now)
    for _ in range(2):
        restarts.count([0, 1])
    with pytest.raises(EngineError, match=r"shard 1 was lost 3 times within 300 s; shard_restarts allows 2"):
        restarts.count([1])
    now = WINDOW_S - 1
    with pytest.raises(EngineError, match="shard 0 was lost 3 times"):
        restarts.count([0])
    now = 2 * WINDOW_S
    restarts.count([0, 1])
