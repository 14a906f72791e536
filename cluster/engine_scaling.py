"""How many engines Serve runs: by the requests that engines have, which Serve itself does not see.

Tokens do not pass Serve's handles, so its own count of requests is of no use. Every engine replica tells Serve's
controller what it has instead (`record_autoscaling_stats`), and the controller asks this policy. Delays and bounds are
Serve's (`AutoscalingConfig`); so is the first engine of none, which a front asks for with a call that has to wait.
"""

from __future__ import annotations

import math
from typing import Any

REQUESTS = "requests"
STARTING = "starting"


class EngineScaling:
    """A Serve autoscaling policy."""

    def __init__(self, target_requests: int) -> None:
        """target_requests: of one engine."""
        self._target = target_requests

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The wanted number of engines by Serve's `AutoscalingContext`, and no state of its own."""
        told = context.aggregated_metrics or {}
        requests = sum(told.get(REQUESTS, {}).values())
        # One that starts is wanted until it can have requests; so is one that has no room yet.
        begins = sum(told.get(STARTING, {}).values()) > 0
        if not context.current_num_replicas:
            begins = context.target_num_replicas > 0
        return max(math.ceil(requests / self._target), int(begins)), {}
