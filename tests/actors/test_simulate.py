"""Simulated timelines: bounds that hold for every program and cost, and cases counted by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors.sequence import LayerPlan, Stage, sequence
from flyray.actors.simulate import Timeline, simulate
from flyray.actors.stage_program import ATTENTIONS, CHANNELS, SIGNATURES, Attention

KINDS = [*SIGNATURES, *(f"link.{channel}" for channel in CHANNELS)]
COSTS = st.fixed_dictionaries({kind: st.integers(0, 20).map(float) for kind in KINDS})


def compute_of(timeline: Timeline, shard: int = 0) -> dict[str, tuple[float, float]]:
    return {
        interval.name: (interval.begin, interval.end)
        for interval in timeline.intervals
        if (interval.resource, interval.shard) == ("compute", shard)
    }


@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(ATTENTIONS), COSTS)
def test_timelines_obey_their_resources(
    layers: int, dense: int, micro_batches: int, shards: int, attention: Attention, costs: dict[str, float]
) -> None:
    program = sequence(LayerPlan(layers, min(dense, layers)), "colocated", micro_batches, attention)
    timeline = simulate(program, costs, shards)
    order = program.stages["colocated"]
    assert len(timeline.intervals) == shards * sum(1 + bool(stage.sends) for stage in order)
    work = sum(costs[stage.kind] for stage in order)
    travel = sum(costs[f"link.{stage.sends}"] for stage in order if stage.sends)
    assert work <= timeline.duration <= work + travel
    assert timeline.bubble_share() == pytest.approx(1 - work / timeline.duration if timeline.duration else 0.0)
    for shard in range(shards):
        for resource in ("compute", "link"):
            own = [item for item in timeline.intervals if (item.shard, item.resource) == (shard, resource)]
            assert all(first.end <= second.begin for first, second in pairwise(own))


def test_travel_is_waited_for_or_hidden() -> None:
    costs = dict.fromkeys(KINDS, 0.0) | {
        "attention": 10.0,
        "experts": 10.0,
        "link.dispatch": 10.0,
        "link.combine": 10.0,
    }
    alone = simulate(sequence(LayerPlan(1, 0), "colocated", 1), costs)
    assert compute_of(alone)["experts.0.0"] == (20.0, 30.0)
    assert (alone.duration, alone.bubble_share()) == (40.0, 0.5)
    paired = simulate(sequence(LayerPlan(1, 0), "colocated", 2), costs)
    spans = compute_of(paired)
    assert (spans["experts.0.0"], spans["experts.0.1"]) == ((20.0, 30.0), (30.0, 40.0))
    assert (paired.duration, paired.bubble_share()) == (50.0, pytest.approx(0.2))


def test_the_shared_expert_runs_while_tokens_travel() -> None:
    costs = dict.fromkeys(KINDS, 0.0) | {"shared": 7.0, "link.dispatch": 10.0}
    spans = compute_of(simulate(sequence(LayerPlan(1, 0), "colocated", 1), costs))
    assert (spans["shared.0.0"], spans["experts.0.0"][0]) == ((0.0, 7.0), 10.0)


def test_all_wait_for_the_slowest_shard() -> None:
    def costs(kind: str, stage: Stage, shard: int) -> float:
        return {"experts": 30.0 if shard == 1 else 10.0, "attention": 5.0}.get(kind, 0.0)

    timeline = simulate(sequence(LayerPlan(2, 0), "colocated", 1), costs, shards=3)
    assert timeline.duration == 70.0
    assert compute_of(timeline, 0)["combine.0.0"] == (35.0, 35.0)
    assert timeline.bubble_share(shard=1) == 0.0
    assert timeline.bubble_share(shard=0) == pytest.approx(40 / 70)
    assert timeline.bubble_share("colocated") == pytest.approx(80 / 210)


def test_roles_apart_wait_for_all_that_send_to_them() -> None:
    def costs(kind: str, stage: Stage, shard: int) -> float:
        return {"attention": 10.0 * (1 + shard), "experts": 5.0, "link.combine": 1.0}.get(kind, 0.0)

    timeline = simulate(sequence(LayerPlan(1, 0), "disaggregated", 1), costs, {"attention": 2, "experts": 3})
    begun = {(item.role, item.shard): item.begin for item in timeline.intervals if item.name == "experts.0.0"}
    assert begun == dict.fromkeys((("experts", 0), ("experts", 1), ("experts", 2)), 20.0)
    combined = [item.begin for item in timeline.intervals if item.name == "combine.0.0"]
    assert combined == [26.0, 26.0]
    assert timeline.bubble_share("experts") == pytest.approx(1 - 5 / 26)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), COSTS)
def test_roles_apart_do_all_work(
    layers: int, micro_batches: int, holders: int, others: int, costs: dict[str, float]
) -> None:
    program = sequence(LayerPlan(layers, 1), "disaggregated", micro_batches)
    timeline = simulate(program, costs, {"attention": holders, "experts": others})
    work = sum(costs[stage.kind] for stage in program.stages["attention"])
    assert timeline.duration >= work
    colocated = sequence(LayerPlan(layers, 1), "colocated", micro_batches).stages["colocated"]
    apart = [stage for role in ("attention", "experts") for stage in program.stages[role]]
    assert sorted(apart, key=lambda stage: stage.name) == sorted(colocated, key=lambda stage: stage.name)


def test_bad_arguments_are_refused() -> None:
    program = sequence(LayerPlan(1, 0), "colocated", 1)
    costs = dict.fromkeys(KINDS, 1.0)
    with pytest.raises(ValueError, match=r"costs: nothing for 'link\.combine', which experts\.0\.0 needs"):
        simulate(program, {kind: 1.0 for kind in KINDS if kind != "link.combine"})
    with pytest.raises(ValueError, match=r"'gate' of gate\.0\.0 is -1.0"):
        simulate(program, costs | {"gate": -1.0})
    with pytest.raises(ValueError, match=r"'gate' of gate\.0\.0 is nan"):
        simulate(program, costs | {"gate": float("nan")})
    with pytest.raises(ValueError, match="shards: 0 is below 1"):
        simulate(program, costs, 0)
    with pytest.raises(ValueError, match="shards: of attention, but the roles are colocated"):
        simulate(program, costs, {"attention": 1})
    with pytest.raises(ValueError, match="no actor 5 of role None"):
        simulate(program, costs).bubble_share(shard=5)
