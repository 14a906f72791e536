"""The dashboard as Grafana takes it; that its metrics exist is looked at on a real server (test_serve_answers.py)."""

from __future__ import annotations

import itertools
import re

import yaml
from grafana import DASHBOARD, dashboard, dashboard_metrics, expressions


def test_panels_have_their_places_and_ids():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    boxes = [panel["gridPos"] for panel in panels]
    assert all(box["x"] >= 0 and box["x"] + box["w"] <= 24 for box in boxes)
    for one, two in itertools.combinations(boxes, 2):
        apart_x = one["x"] + one["w"] <= two["x"] or two["x"] + two["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= two["y"] or two["y"] + two["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(panel["title"] and panel["description"] for panel in panels)


def test_every_query_is_of_the_chosen_model_and_source():
    board = dashboard()
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert names == {"datasource", "model", "window"}
    for panel in board["panels"]:
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            selectors = re.findall(r"\{[^{}]*\}", target["expr"])
            assert selectors
            assert all(each == '{model_name=~"$model"}' for each in selectors)
            assert target["expr"].count("(") == target["expr"].count(")")
    assert all(set(re.findall(r"\$(\w+)", each)) <= names for each in expressions())
    assert len(dashboard_metrics()) > 15


def test_counters_are_asked_for_by_their_rates():
    for each in expressions():
        for counter in re.findall(r"[\w:]+_total\{[^}]*\}.{0,3}", each):
            assert counter.endswith("[$w"), each


def test_prometheus_scrapes_metrics():
    config = yaml.safe_load((DASHBOARD.parent / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
