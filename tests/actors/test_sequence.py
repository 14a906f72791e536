"""Stage programs that are built pass the check; any damage to one is caught."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flyray.actors.sequence import LayerPlan, ProgramError, Stage, StageProgram, check, sequence
from flyray.actors.stage_program import ATTENTIONS, CHANNELS, SIGNATURES, make_stage


@st.composite
def programs(draw: st.DrawFn) -> StageProgram:
    layers = draw(st.integers(1, 6))
    plan = LayerPlan(layers, draw(st.integers(0, layers)))
    return sequence(plan, "colocated", draw(st.integers(1, 4)), draw(st.sampled_from(ATTENTIONS)))


def changed(program: StageProgram, stages: list[Stage]) -> StageProgram:
    return dataclasses.replace(program, stages={"colocated": tuple(stages)})


def interpret(program: StageProgram) -> dict[int, tuple[str, ...]]:
    """Runs the program on symbols: for each micro-batch, what the sampled tokens were made from."""
    buffers: dict[str, object] = {}
    wires: dict[str, deque[object]] = {channel: deque() for channel in CHANNELS}
    for stage in program.stages["colocated"]:
        inputs = [buffers[name] for name in stage.reads]
        if stage.receives:
            inputs.append(wires[stage.receives].popleft())
        value = (stage.name, *inputs)
        for name in stage.writes:
            buffers[name] = value
        if stage.sends:
            wires[stage.sends].append(value)
    assert not any(wires.values())
    return {number: buffers[f"tokens.{number}"] for number in range(program.micro_batches)}  # type: ignore[misc]


def meaning(program: StageProgram, number: int) -> object:
    """What the model is, as symbols, written without any program's order."""
    plan, tensor = program.layers, program.attention == "tensor_parallel"

    def name(kind: str, layer: int = -1) -> str:
        return f"{kind}.{layer}.{number}" if layer >= 0 else f"{kind}.{number}"

    hidden: tuple[object, ...] = (name("embed"),)
    for layer in range(plan.num_hidden_layers):
        if tensor:
            hidden = (name("output", layer), hidden, (name("own_heads", layer), hidden))
        else:
            hidden = (name("attention", layer), hidden)
        if layer < plan.first_k_dense_replace:
            hidden = (name("dense", layer), hidden)
            continue
        routing = (name("gate", layer), hidden)
        sent = (name("own_experts" if tensor else "dispatch", layer), routing)
        shared = (name("shared", layer), routing)
        outputs = sent if tensor else (name("experts", layer), sent)
        hidden = (name("combine", layer), hidden, routing, sent, shared, outputs)
    if tensor:
        return (name("sample"), (name("logits"), hidden, (name("own_logits"), hidden)))
    return (name("sample"), (name("head"), hidden))


@given(programs())
def test_a_built_program_computes_the_model(program: StageProgram) -> None:
    check(program)
    for number, value in interpret(program).items():
        assert value == meaning(program, number)


def test_the_program_of_one_micro_batch() -> None:
    stages = sequence(LayerPlan(2, 1), "colocated", 1).stages["colocated"]
    assert [stage.name for stage in stages] == [
        "embed.0",
        *("attention.0.0", "dense.0.0"),
        *("attention.1.0", "gate.1.0", "dispatch.1.0", "shared.1.0", "experts.1.0", "combine.1.0"),
        *("head.0", "sample.0"),
    ]


def test_the_tensor_parallel_program_of_one_micro_batch() -> None:
    program = sequence(LayerPlan(2, 1), "colocated", 1, "tensor_parallel")
    assert program.name == "tensor_parallel-1"
    assert [stage.name for stage in program.stages["colocated"]] == [
        "embed.0",
        *("own_heads.0.0", "output.0.0", "dense.0.0"),
        *("own_heads.1.0", "output.1.0", "gate.1.0", "own_experts.1.0", "shared.1.0", "combine.1.0"),
        *("own_logits.0", "logits.0", "sample.0"),
    ]


def test_heads_travel_while_another_micro_batch_computes() -> None:
    program = sequence(LayerPlan(2, 0), "colocated", 2, "tensor_parallel")
    names = [stage.name for stage in program.stages["colocated"]]
    assert names.index("own_heads.1.0") < names.index("own_heads.1.1") < names.index("output.1.0")
    assert names.index("own_experts.0.0") < names.index("output.0.1") < names.index("combine.0.0")


def test_a_stage_of_the_other_attention_is_caught() -> None:
    program = sequence(LayerPlan(1, 0), "colocated", 1, "tensor_parallel")
    wrong = [make_stage("attention", 0, 0) if s.kind == "own_heads" else s for s in program.stages["colocated"]]
    with pytest.raises(ProgramError, match=r"attention\.0\.0 reads the hidden\.0 of embed\.0, which is not for it"):
        check(changed(program, wrong))


def test_tokens_travel_while_another_micro_batch_computes() -> None:
    names = [stage.name for stage in sequence(LayerPlan(2, 0), "colocated", 2).stages["colocated"]]
    assert names.index("dispatch.1.0") < names.index("attention.1.1") < names.index("experts.1.0")
    assert names.index("experts.0.0") < names.index("experts.0.1") < names.index("combine.0.0")


def drop(program: StageProgram, data: st.DataObject) -> list[Stage]:
    stages = list(program.stages["colocated"])
    stages.pop(data.draw(st.integers(0, len(stages) - 1)))
    return stages


def repeat(program: StageProgram, data: st.DataObject) -> list[Stage]:
    """Any stage once more, anywhere; the stages of an exchange among them."""
    stages = list(program.stages["colocated"])
    stages.insert(data.draw(st.integers(0, len(stages))), data.draw(st.sampled_from(stages)))
    return stages


def swap_dependent(program: StageProgram, data: st.DataObject) -> list[Stage]:
    """A stage changes places with one that takes what it makes."""
    stages = list(program.stages["colocated"])
    pairs = [
        (early, late)
        for late, reader in enumerate(stages)
        for early, writer in enumerate(stages[:late])
        if set(writer.writes) & set(reader.reads)
        or (
            writer.sends
            and (writer.sends, writer.layer, writer.micro_batch) == (reader.receives, reader.layer, reader.micro_batch)
        )
    ]
    early, late = data.draw(st.sampled_from(pairs))
    stages[early], stages[late] = stages[late], stages[early]
    return stages


def swap_sends(program: StageProgram, data: st.DataObject) -> list[Stage]:
    """One micro-batch's tokens are sent after those of the next, but still received before them."""
    assume(program.micro_batches > 1)
    stages = list(program.stages["colocated"])
    kinds = ("dispatch", "own_heads")
    sends = [stage for stage in stages if stage.kind in kinds and stage.micro_batch + 1 < program.micro_batches]
    assume(sends)
    stage = data.draw(st.sampled_from(sends))
    stages.remove(stage)
    stages.insert(stages.index(make_stage(stage.kind, stage.layer, stage.micro_batch + 1)) + 1, stage)
    return stages


def rename(program: StageProgram, data: st.DataObject) -> list[Stage]:
    """One read or write goes to another buffer, of another value or micro-batch."""
    stages = list(program.stages["colocated"])
    buffers = sorted({name for stage in stages for name in stage.writes} | {f"hidden.{program.micro_batches}"})
    index = data.draw(st.sampled_from([i for i, stage in enumerate(stages) if stage.reads or stage.writes]))
    stage = stages[index]
    part = data.draw(st.sampled_from([part for part in ("reads", "writes") if getattr(stage, part)]))
    names = list(getattr(stage, part))
    position = data.draw(st.integers(0, len(names) - 1))
    names[position] = data.draw(st.sampled_from([name for name in buffers if name != names[position]]))
    stages[index] = dataclasses.replace(stage, **{part: tuple(names)})
    return stages


def move_layer(program: StageProgram, data: st.DataObject) -> list[Stage]:
    stages = list(program.stages["colocated"])
    index = data.draw(st.integers(0, len(stages) - 1))
    layers = [layer for layer in range(-1, program.layers.num_hidden_layers + 1) if layer != stages[index].layer]
    stages[index] = dataclasses.replace(stages[index], layer=data.draw(st.sampled_from(layers)))
    return stages


def move_micro_batch(program: StageProgram, data: st.DataObject) -> list[Stage]:
    """A whole stage is given to another micro-batch, its buffers too."""
    stages = list(program.stages["colocated"])
    index = data.draw(st.integers(0, len(stages) - 1))
    stage = stages[index]
    number = data.draw(st.integers(0, program.micro_batches).filter(lambda number: number != stage.micro_batch))
    stages[index] = make_stage(stage.kind, stage.layer, number)
    return stages


def change_kind(program: StageProgram, data: st.DataObject) -> list[Stage]:
    stages = list(program.stages["colocated"])
    index = data.draw(st.integers(0, len(stages) - 1))
    kind = data.draw(st.sampled_from([kind for kind in SIGNATURES if kind != stages[index].kind]))
    stages[index] = make_stage(kind, stages[index].layer, stages[index].micro_batch)
    return stages


def cut_channel(program: StageProgram, data: st.DataObject) -> list[Stage]:
    stages = list(program.stages["colocated"])
    index = data.draw(st.integers(0, len(stages) - 1))
    part = data.draw(st.sampled_from(("receives", "sends")))
    channels = [channel for channel in ("", "dispatch", "combine") if channel != getattr(stages[index], part)]
    stages[index] = dataclasses.replace(stages[index], **{part: data.draw(st.sampled_from(channels))})
    return stages


def drop_micro_batch(program: StageProgram, data: st.DataObject) -> list[Stage]:
    number = data.draw(st.integers(0, program.micro_batches - 1))
    return [stage for stage in program.stages["colocated"] if stage.micro_batch != number]


Damage = Callable[[StageProgram, st.DataObject], list[Stage]]


@pytest.mark.parametrize(
    "damage",
    [
        drop,
        repeat,
        swap_dependent,
        swap_sends,
        rename,
        move_layer,
        move_micro_batch,
        change_kind,
        cut_channel,
        drop_micro_batch,
    ],
)
@given(program=programs(), data=st.data())
def test_any_damage_is_caught(damage: Damage, program: StageProgram, data: st.DataObject) -> None:
    with pytest.raises(ProgramError):
        check(changed(program, damage(program, data)))


@given(programs(), st.data())
def test_what_passes_the_check_computes_the_model(program: StageProgram, data: st.DataObject) -> None:
    """Any reordering is either refused or means the same."""
    stages = list(program.stages["colocated"])
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(stages) - 2))
        stages[index], stages[index + 1] = stages[index + 1], stages[index]
    other = changed(program, stages)
    try:
        check(other)
    except ProgramError:
        return
    assert interpret(other) == interpret(program)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda stages: stages[1:], "attention.0.0 reads hidden.0 before it is written"),
        (lambda stages: stages[:-1], "the logits.0 of head.0 is never read by sample.0"),
        (lambda stages: [*stages, stages[-1]], "sample.0 comes twice"),
        (
            lambda stages: [stage for stage in stages if stage.kind != "shared"],
            "combine.1.0 reads shared.0 before it is written",
        ),
        (
            lambda stages: [stage for stage in stages if stage.kind != "experts"],
            "combine.1.0 waits for a message that is never sent",
        ),
        (
            lambda stages: [stage for stage in stages if stage.name != "attention.1.0"],
            "gate.1.0 reads the hidden.0 of dense.0.0, which is not for it",
        ),
        (
            lambda stages: [stages[0], make_stage("dense", 5, 0), *stages[1:]],
            "dense.5.0: layer 5 has no dense",
        ),
    ],
)
def test_errors_name_the_stage(change: Callable[[list[Stage]], list[Stage]], text: str) -> None:
    program = sequence(LayerPlan(2, 1), "colocated", 1)
    with pytest.raises(ProgramError) as caught:
        check(changed(program, change(list(program.stages["colocated"]))))
    assert str(caught.value) == f"colocated-1, colocated{':' if ' 5 ' not in text else ','} {text}"


def test_a_layer_cannot_begin_before_the_last_one_ends() -> None:
    program = sequence(LayerPlan(2, 0), "colocated", 1)
    stages = list(program.stages["colocated"])
    names = [stage.name for stage in stages]
    stages.insert(names.index("combine.0.0"), stages.pop(names.index("attention.1.0")))
    with pytest.raises(ProgramError, match=r"attention\.1\.0 reads the hidden\.0 of attention\.0\.0"):
        check(changed(program, stages))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((LayerPlan(2, 1), "colocated", 0), "micro_batches: 0 is below 1"),
        (
            (LayerPlan(2, 1), "elsewhere", 1),
            "placement: 'elsewhere' is not known, there are 'colocated' and 'disaggregated'",
        ),
        (
            (LayerPlan(2, 1), "colocated", 1, "expert"),
            "attention: 'expert' is none of data_parallel, tensor_parallel",
        ),
        (
            (LayerPlan(2, 1), "disaggregated", 1, "tensor_parallel"),
            "attention: 'tensor_parallel' is colocated, not disaggregated",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple, text: str) -> None:
    with pytest.raises(ProgramError) as caught:
        sequence(*arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(("layers", "dense"), [(0, 0), (2, 3), (2, -1)])
def test_bad_layers_are_refused(layers: int, dense: int) -> None:
    with pytest.raises(ProgramError, match=r"num_hidden_layers|first_k_dense_replace"):
        LayerPlan(layers, dense)
