"""Retry-After: how long a queue takes at the rate at which it has moved."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flyray.cluster.front.queue_clock import LONGEST_S, SHORTEST_S, QueueClock


def test_nothing_known_is_the_shortest_time():
    assert QueueClock().seconds_for(1000, 50.0) == SHORTEST_S


@given(st.integers(1, 64), st.floats(0.01, 0.4), st.integers(1, 2000))
def test_a_steady_queue_takes_its_length_over_its_rate(count, gap, waiting):
    clock = QueueClock()
    for index in range(count):
        clock.left(100.0 + index * gap)
    seconds = clock.seconds_for(waiting, 100.0 + count * gap)
    assert abs(seconds - min(max(math.ceil(waiting * gap), SHORTEST_S), LONGEST_S)) <= 1


def test_what_is_long_past_does_not_count():
    clock = QueueClock()
    for _ in range(10):
        clock.left(0.0)
    clock.left(95.0)
    assert clock.seconds_for(3, 100.0) == 15
    assert clock.seconds_for(3, 1000.0) == SHORTEST_S
