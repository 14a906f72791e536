"""What deploy/grafana's dashboard asks Prometheus for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "flyray.json"
_METRIC = re.compile(r"\b(?:vllm|flyray):[a-z0-9_]+")


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def expressions() -> list[str]:
    """All of the panels' queries, and those of the variables."""
    board = dashboard()
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    variables = [variable["query"] for variable in board["templating"]["list"]]
    return asked + [query["query"] for query in variables if isinstance(query, dict)]


def dashboard_metrics() -> set[str]:
    """Names of samples, as /metrics has them."""
    return {name for expression in expressions() for name in _METRIC.findall(expression)}
