"""Messages as bytes: msgpack of `[type name, version, field, …]`, of known types in known versions only.

`@message(version=…)` registers a frozen dataclass; its field codecs are made once, then. Both directions check every
field, so a wrong value is found where it is made, and bytes from anywhere either decode to a valid message or raise
`WireError`, never another exception. Nothing is ever unpickled or called by name.

Field types: int (signed 64 bits; a bool is not one), float (an int is not one), str, bool, bytes, message types
declared before, and `tuple[X, ...]` and `tuple[X, Y]` of any of these. A change of a message's fields needs a new
version number.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import msgpack

T = TypeVar("T")
Check = Callable[[Any], Any]

_INT_MIN, _INT_MAX = -(2**63), 2**63 - 1
_SCALARS = (int, float, str, bool, bytes)


class WireError(ValueError):
    """A message that cannot be encoded, or bytes that are no message; names the message and the field."""


class _Mismatch(Exception):
    """What a value should have been; the message codec adds which field it is."""


@dataclasses.dataclass(frozen=True)
class _MessageCodec:
    """How one message type becomes a tuple for msgpack, and back."""

    kind: type
    version: int
    fields: tuple[tuple[str, Check, Check], ...]

    def pack(self, value: Any) -> tuple[Any, ...]:
        """A message -> `(name, version, field, …)`, checked."""
        if type(value) is not self.kind:
            raise _Mismatch(f"expected {self.kind.__name__}, got {_describe(value)}")
        packed: list[Any] = [self.kind.__name__, self.version]
        name = ""
        try:
            for name, pack, _ in self.fields:
                packed.append(pack(getattr(value, name)))
        except _Mismatch as error:
            raise WireError(f"{self.kind.__name__}.{name}: {error}") from None
        return tuple(packed)

    def unpack(self, raw: Any) -> Any:
        """The tuple that `pack` made -> the message; anything else raises `WireError` or `_Mismatch`."""
        kind = self.kind.__name__
        if type(raw) is not tuple or len(raw) < 2 or raw[0] != kind:
            raise _Mismatch(f"expected {kind}, got {_describe(raw)}")
        if type(raw[1]) is not int or raw[1] != self.version:
            raise WireError(f"{kind}: version {_describe(raw[1])} is not the known version {self.version}")
        if len(raw) != len(self.fields) + 2:
            raise WireError(f"{kind}: has {len(raw) - 2} fields, expected {len(self.fields)}")
        values: list[Any] = []
        name = ""
        try:
            for (name, _, unpack), item in zip(self.fields, raw[2:], strict=True):  # noqa: B007
                values.append(unpack(item))
        except _Mismatch as error:
            raise WireError(f"{kind}.{name}: {error}") from None
        try:
            return self.kind(*values)
        except (ValueError, TypeError) as error:  # a message that validates itself
            raise WireError(f"{kind}: {error}") from error


_CODECS: dict[str, _MessageCodec] = {}  # filled by `message` while modules are imported, only read after


def message(*, version: int) -> Callable[[type[T]], type[T]]:
    """Class decorator: registers a frozen dataclass as a message; the class itself is unchanged.

    Raises TypeError if the class is not a frozen dataclass, a field's type cannot travel, or the name is taken.
    """

    def register(kind: type[T]) -> type[T]:
        name = kind.__name__
        if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise TypeError(f"message {name}: not a frozen dataclass")
        if name in _CODECS:
            raise TypeError(f"message {name}: the name is taken by {_CODECS[name].kind.__module__}.{name}")
        hints = typing.get_type_hints(kind)
        fields = []
        for field in dataclasses.fields(kind):
            if not field.init or field.kw_only:
                raise TypeError(f"message {name}.{field.name}: must be a positional argument of the class")
            try:
                pack, unpack = _codec_of(hints[field.name])
            except TypeError as error:
                raise TypeError(f"message {name}.{field.name}: {error}") from None
            fields.append((field.name, pack, unpack))
        _CODECS[name] = _MessageCodec(kind, version, tuple(fields))
        return kind

    return register


def encode(message: object) -> bytes:
    """A message -> its bytes. Raises `WireError` for an unregistered type or a field of the wrong type or range."""
    codec = _CODECS.get(type(message).__name__)
    if codec is None or codec.kind is not type(message):
        raise WireError(f"{type(message).__name__}: not a message type")
    packed = codec.pack(message)
    try:
        return msgpack.packb(packed)  # type: ignore[return-value]
    except (ValueError, TypeError, OverflowError) as error:  # lone surrogates, more than 4 GiB
        raise WireError(f"{type(message).__name__}: {error}") from error


def decode(data: bytes) -> object:
    """Bytes -> the message they hold. Raises `WireError` unless they are exactly one message of a known version."""
    try:
        raw = msgpack.unpackb(data, use_list=False, ext_hook=_no_extension)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not a message: {error or type(error).__name__}") from error
    if type(raw) is not tuple or not raw or type(raw[0]) is not str:
        raise WireError(f"not a message: {_describe(raw)}")
    codec = _CODECS.get(raw[0])
    if codec is None:
        raise WireError(f"unknown message type {raw[0][:60]!r}")
    try:
        return codec.unpack(raw)
    except _Mismatch as error:
        raise WireError(str(error)) from None


def decode_as(data: bytes, kind: type[T]) -> T:
    """As `decode`, and the message must be of `kind`."""
    value = decode(data)
    if type(value) is not kind:
        raise WireError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _codec_of(hint: Any) -> tuple[Check, Check]:
    """(pack, unpack) of a field of this type."""
    if hint in _SCALARS:
        check = _scalar(hint)
        return check, check
    if typing.get_origin(hint) is tuple and len(args := typing.get_args(hint)) == 2 and args[1] is Ellipsis:
        if args[0] in _SCALARS:
            check = _column(args[0])
            return check, check
        pack, unpack = _codec_of(args[0])
        return _each(pack), _each(unpack)
    if typing.get_origin(hint) is tuple and typing.get_args(hint):
        packs, unpacks = zip(*map(_codec_of, typing.get_args(hint)), strict=True)
        return _row(packs), _row(unpacks)
    codec = _CODECS.get(getattr(hint, "__name__", ""))
    if codec is not None and codec.kind is hint:
        return codec.pack, codec.unpack
    raise TypeError(
        f"{hint} cannot travel; int, float, str, bool, bytes, earlier messages, tuple[X, ...] and tuple[X, Y] can"
    )


def _scalar(kind: type) -> Check:
    return _check_int if kind is int else _exactly(kind)


def _check_int(value: Any) -> int:
    if type(value) is not int:
        raise _Mismatch(f"expected int, got {_describe(value)}")
    if not _INT_MIN <= value <= _INT_MAX:
        raise _Mismatch(f"{value} does not fit 64 bits")
    return value


def _column(kind: type) -> Check:
    """The codec of a tuple of scalars; prompts are thousands long, so the common case stays out of the interpreter."""
    only, one_by_one = {kind}, _each(_scalar(kind))

    def check(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple:
            raise _Mismatch(f"expected a tuple, got {_describe(values)}")
        if values and set(map(type, values)) != only:
            return one_by_one(values)
        if values and kind is int and (min(values) < _INT_MIN or max(values) > _INT_MAX):
            return one_by_one(values)
        return values

    return check


def _exactly(kind: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _Mismatch(f"expected {kind.__name__}, got {_describe(value)}")
        return value

    return check


def _each(codec: Check) -> Check:
    def check(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple:
            raise _Mismatch(f"expected a tuple, got {_describe(values)}")
        index, checked = 0, []
        try:
            for index, value in enumerate(values):  # noqa: B007
                checked.append(codec(value))
        except _Mismatch as error:
            raise _Mismatch(f"item {index}: {error}") from None
        return tuple(checked)

    return check


def _row(codecs: tuple[Check, ...]) -> Check:
    """The codec of a tuple of a fixed length, by those of its items."""

    def check(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple or len(values) != len(codecs):
            raise _Mismatch(f"expected a tuple of {len(codecs)}, got {_describe(values)}")
        index, checked = 0, []
        try:
            for index, (codec, value) in enumerate(zip(codecs, values, strict=True)):  # noqa: B007
                checked.append(codec(value))
        except _Mismatch as error:
            raise _Mismatch(f"item {index}: {error}") from None
        return tuple(checked)

    return check


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} of {len(data)} bytes")


def _describe(value: Any) -> str:
    """A value for an error message, never long."""
    text = repr(value) if isinstance(value, int | float | str | bytes) else ""
    return f"{type(value).__name__} {text[:60]}".rstrip()
