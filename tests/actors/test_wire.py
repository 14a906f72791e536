"""Messages survive the wire unchanged; anything else is a WireError that says what is wrong."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyray.actors import request, step_plan
from flyray.actors.request import Cancel, EngineStatus, Generate, ProgressBatch
from flyray.actors.step_plan import NewTokens, Sampling, Slice, StageTime, StepPlan, StepResult
from flyray.actors.wire import WireError, decode, decode_as, encode, message

SCALARS = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    bool: st.booleans(),
    bytes: st.binary(max_size=8),
}


def values_of(hint: typing.Any) -> st.SearchStrategy:
    """Valid values of a field's type."""
    if hint in SCALARS:
        return SCALARS[hint]
    if typing.get_origin(hint) is tuple:
        first, last = typing.get_args(hint)[0], typing.get_args(hint)[-1]
        if last is not Ellipsis:
            return st.tuples(*map(values_of, typing.get_args(hint)))
        return st.lists(values_of(first), max_size=4).map(tuple)
    hints = typing.get_type_hints(hint)
    return st.builds(hint, *(values_of(hints[field.name]) for field in dataclasses.fields(hint)))


@message(version=3)
@dataclass(frozen=True)
class Everything:
    """Each field type that can travel."""

    number: int
    real: float
    text: str
    flag: bool
    raw: bytes
    inner: StageTime
    table: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]


ALL_TYPES = [
    Everything,
    *(
        value
        for module in (step_plan, request)
        for value in vars(module).values()
        if dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ),
]
MESSAGES = st.one_of([values_of(kind) for kind in ALL_TYPES])
SAMPLING = Sampling(0.0, 1.0, 0, 7)
PLAN = StepPlan("kimi", 2, 9, "colocated", (4,), (), (Slice(1, 0, (5, 6), (0,), True),), False)


def test_all_messages_of_the_engine_are_tried() -> None:
    names = {kind.__name__ for kind in ALL_TYPES}
    assert {"StepPlan", "StepResult", "Generate", "ProgressBatch", "EngineStatus", "Cancel"} <= names


@given(MESSAGES)
def test_round_trip(value: object) -> None:
    data = encode(value)
    assert decode(data) == value
    assert decode_as(data, type(value)) == value


@given(MESSAGES, st.data())
def test_damaged_bytes_are_a_message_or_a_wire_error(value: object, data: st.DataObject) -> None:
    whole = bytearray(encode(value))
    index = data.draw(st.integers(0, len(whole) - 1))
    whole[index] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(whole))
    except WireError:
        return
    assert decode(encode(decoded)) == decoded or _holds_nan(decoded)


@given(MESSAGES, st.data())
def test_truncated_or_extended_bytes_are_refused(value: object, data: st.DataObject) -> None:
    whole = encode(value)
    with pytest.raises(WireError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(WireError):
        decode(whole + data.draw(st.binary(min_size=1, max_size=3)))


@given(st.binary(max_size=64))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


@given(st.recursive(st.integers() | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3), max_leaves=12))
def test_other_msgpack_is_refused(value: object) -> None:
    try:
        data = msgpack.packb(value)
    except OverflowError:
        return
    assert data is not None
    with pytest.raises(WireError):
        decode(data)


@pytest.mark.parametrize("depth", [10, 600, 5_000, 200_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(WireError):
        decode(b"\x91" * depth + b"\x00")


def test_floats_keep_infinity_and_nan() -> None:
    assert decode(encode(NewTokens((1,), (2,), (-math.inf,)))) == NewTokens((1,), (2,), (-math.inf,))
    assert math.isnan(decode_as(encode(NewTokens((1,), (2,), (math.nan,))), NewTokens).logprobs[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (StageTime("a", True, 2), "StageTime.begin: expected int, got bool True"),
        (StageTime("a", 2**63, 2), "StageTime.begin: 9223372036854775808 does not fit 64 bits"),
        (NewTokens((1,), (2,), (0.5, 0)), "NewTokens.logprobs: item 1: expected float, got int 0"),
        (NewTokens(tops=(((3,),),)), "NewTokens.tops: item 0: item 0: expected a tuple of 2, got tuple"),
        (NewTokens(tops=(((3, 0.0), (3, 4)),)), "NewTokens.tops: item 0: item 1: item 1: expected float, got int 4"),
        (Slice(1, 0, (1, True), (), True), "Slice.tokens: item 1: expected int, got bool True"),
        (Slice(1, 0, [1], (), True), "Slice.tokens: expected a tuple, got list"),
        (dataclasses.replace(PLAN, slices=list(PLAN.slices)), "StepPlan.slices: expected a tuple, got list"),
        (Slice(1, 0, (-(2**63) - 1,), (), True), "Slice.tokens: item 0: -9223372036854775809 does not fit"),
        (Generate("a", (1,), 1, None, (), 0, False), "Generate.sampling: expected Sampling, got NoneType"),
        (dataclasses.replace(PLAN, slices=(PLAN,)), "StepPlan.slices: item 0: expected Slice, got StepPlan"),
        (Cancel("\ud800"), "Cancel: "),
        ("text", "str: not a message type"),
    ],
)
def test_wrong_values_are_refused_where_they_are_made(value: object, text: str) -> None:
    with pytest.raises(WireError) as caught:
        encode(value)
    assert str(caught.value).startswith(text)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (["Nothing", 1], "unknown message type 'Nothing'"),
        (["Cancel", 2, "a"], "Cancel: version int 2 is not the known version 1"),
        (["Cancel", True, "a"], "Cancel: version bool True is not the known version 1"),
        (["Cancel", 1], "Cancel: has 0 fields, expected 1"),
        (["Cancel", 1, "a", "b"], "Cancel: has 2 fields, expected 1"),
        (["Cancel", 1, b"a"], "Cancel.request: expected str, got bytes b'a'"),
        (["StageTime", 1, "a", 2**64 - 1, 0], "StageTime.begin: 18446744073709551615 does not fit 64 bits"),
        (
            ["ProgressBatch", 2, "e", [["Cancel", 1, "a"]], [], [], []],
            "ProgressBatch.items: item 0: expected Progress, got tuple",
        ),
        ({"Cancel": 1}, "not a message: dict"),
        (msgpack.ExtType(5, b"x"), "not a message: extension type 5 of 1 bytes"),
    ],
)
def test_wrong_bytes_are_refused_by_name(raw: object, text: str) -> None:
    data = msgpack.packb(raw)
    assert data is not None
    with pytest.raises(WireError) as caught:
        decode(data)
    assert str(caught.value) == text


def test_decode_as_refuses_other_messages() -> None:
    with pytest.raises(WireError, match="expected EngineStatus, got Cancel"):
        decode_as(encode(Cancel("a")), EngineStatus)
    assert decode_as(encode(ProgressBatch("e", ())), ProgressBatch).items == ()


def test_a_message_may_check_itself() -> None:
    @message(version=1)
    @dataclass(frozen=True)
    class Positive:
        value: int

        def __post_init__(self) -> None:
            if self.value < 1:
                raise ValueError(f"value {self.value} is below 1")

    assert decode(encode(Positive(3))) == Positive(3)
    data = msgpack.packb(["Positive", 1, 0])
    assert data is not None
    with pytest.raises(WireError, match="Positive: value 0 is below 1"):
        decode(data)


def test_bad_declarations_are_refused() -> None:
    with pytest.raises(TypeError, match=r"message Cancel: the name is taken by flyray\.actors\.request\.Cancel"):
        message(version=1)(dataclass(frozen=True)(type("Cancel", (), {"__annotations__": {"request": str}})))
    with pytest.raises(TypeError, match="message Thawed: not a frozen dataclass"):
        message(version=1)(dataclass(type("Thawed", (), {"__annotations__": {"request": str}})))
    for hint in (dict, list[int], tuple[int, dict], tuple, int | None, object):
        with pytest.raises(TypeError, match=r"message Odd\.field: .* cannot travel"):
            message(version=1)(dataclass(frozen=True)(type("Odd", (), {"__annotations__": {"field": hint}})))


def test_results_are_small() -> None:
    """A decode step of 128 sequences answers in two kilobytes."""
    tokens = NewTokens(tuple(range(128)), tuple(range(1000, 1128)), (-0.5,) * 128)
    assert len(encode(StepResult("kimi", 1, 5, 0, tokens, (), (), ""))) < 2048


def _holds_nan(value: object) -> bool:
    """A flipped byte may have made a NaN, which equals nothing."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, tuple):
        return any(map(_holds_nan, value))
    return dataclasses.is_dataclass(value) and any(
        _holds_nan(getattr(value, f.name)) for f in dataclasses.fields(value)
    )
