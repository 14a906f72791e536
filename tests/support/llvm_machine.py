"""Executes a compiled FlyDSL kernel, in LLVM's language for AMD's GPUs, in NumPy: a program of 256 threads at a time.

What is executed is what the compiler turns into the GPU's instructions, with all its addresses, loops and conditions.
All threads go on together, so that nothing depends on their timing; instead, LDS that one wave writes and another reads
or writes with no barrier between is an error, as is any access outside a tensor. Loads through a buffer give zeros
outside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from wave_machine import matrix_instruction

THREADS = 256
_WAVE = np.arange(THREADS) // 64
_SPACE = 1 << 40  # of addresses of one tensor
_DTYPES = {
    "i1": np.dtype(bool), "i8": np.dtype(np.int8), "i16": np.dtype(np.int16), "i32": np.dtype(np.int32),
    "i64": np.dtype(np.int64), "float": np.dtype(np.float32),
}  # fmt: skip
_LINE = re.compile(r"^  (?:(%\d+) = )?(?:tail )?(\w+) ?(.*)$")
_TYPE = r"(?:<\d+ x \w+>|ptr(?: addrspace\(\d\))?|\w+)"
_OPERAND = r"(?:%\d+|@\w+|<[^>]*>|[-\w.+]+)"
_VALUE = re.compile(rf"({_TYPE}) (?:noundef )?({_OPERAND})$")
_FLAGS = re.compile(r"\b(nuw|nsw|exact|disjoint|inbounds|nneg|samesign|range\([^)]*\)) ")


class _Lds:
    """Words of LDS, who wrote and read each last, and before which barrier."""

    def __init__(self, size: int) -> None:
        self.words = np.full(size // 4, 0x55555555, dtype=np.int32)
        self._written = np.full((size // 4, 2), -1)
        self._read = np.full((size // 4, 2), -1)
        self.barriers = 0

    def load(self, words: np.ndarray, waves: np.ndarray) -> np.ndarray:
        self._alone(self._written, words, waves, "reads what another wrote")
        self._read[words] = np.stack(np.broadcast_arrays(waves[:, None], self.barriers), axis=-1)
        return self.words[words]

    def store(self, words: np.ndarray, values: np.ndarray, waves: np.ndarray) -> None:
        self._alone(self._written, words, waves, "writes what another wrote")
        self._alone(self._read, words, waves, "writes what another reads")
        assert len(np.unique(words)) == words.size, "two threads write one word"
        self.words[words] = values
        self._written[words] = np.stack(np.broadcast_arrays(waves[:, None], self.barriers), axis=-1)

    def _alone(self, record: np.ndarray, words: np.ndarray, waves: np.ndarray, what: str) -> None:
        wave, barrier = record[words, 0], record[words, 1]
        assert not ((barrier == self.barriers) & (wave != waves[:, None])).any(), f"a wave {what} before a barrier"


@dataclass
class Machine:
    """One kernel's text, and the tensors and numbers that it is launched with, in the order of its arguments."""

    text: str
    arguments: list[np.ndarray | int]
    lds_bytes: int
    _values: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        body = re.search(r"define amdgpu_kernel void @\w+\((.*?)\)[^()]*\{\n(.*?)\n\}", self.text, re.DOTALL)
        assert body is not None
        names = re.findall(r"(%\d+)(?:,|$)", body[1])
        kinds = re.findall(r"(ptr addrspace\(1\)|<\{ <\{[^}]*\}> \}>|i32|i64)[^,%]* (%\d+)", body[1])
        assert [name for _, name in kinds] == names
        taken = [(kind, name) for kind, name in kinds if not kind.startswith("<{")]
        assert len(taken) == len(self.arguments), (taken, len(self.arguments))
        self._tensors = [each for each in self.arguments if isinstance(each, np.ndarray)]
        bases = iter(range(1, len(self._tensors) + 1))
        for (kind, name), each in zip(taken, self.arguments, strict=True):
            value = next(bases) * _SPACE if isinstance(each, np.ndarray) else each
            self._values[name] = np.full(THREADS, value, dtype=np.int64 if kind != "i32" else np.int32)
        self._blocks: dict[str, list[tuple[str, str, str]]] = {}
        label = f"%{len(kinds)}"
        for line in body[2].splitlines():
            if found := re.match(r"^(\d+):", line):
                label = f"%{found[1]}"
            elif found := _LINE.match(line):
                self._blocks.setdefault(label, []).append((found[1], found[2], found[3]))

    def run(self, column: int, row: int) -> None:
        """The program at (x, y) of the grid."""
        self._program, self._lds = (column, row), _Lds(self.lds_bytes)
        labels = list(self._blocks)
        self._edges: dict[str, dict[str, np.ndarray]] = {labels[0]: {"": np.ones(THREADS, dtype=bool)}}
        at = 0
        while at < len(labels):
            came = self._edges.pop(labels[at], {})
            self._active = np.logical_or.reduce([*came.values(), np.zeros(THREADS, dtype=bool)])
            back = self._block(labels[at], came) if self._active.any() else None
            at = at + 1 if back is None else labels.index(back)

    def _block(self, label: str, came: dict[str, np.ndarray]) -> str | None:
        """Executes a block; where it jumps back to."""
        passed = list(self._blocks).index(label)
        merged = {}
        for name, operation, rest in self._blocks[label]:
            if operation == "phi":
                merged[name] = self._phi(rest, came)
                continue
            self._values.update(merged)
            merged = {}
            if operation == "br":
                targets = re.findall(r"label (%\d+)", rest)
                condition = self._value(rest.split(",")[0]) if len(targets) == 2 else np.ones(THREADS, dtype=bool)
                for target, taken in zip(targets, (condition, ~condition), strict=False):
                    self._edges.setdefault(target, {})[label] = self._active & taken
                back = [each for each in targets if list(self._blocks).index(each) <= passed]
                return back[0] if back else None
            if operation != "ret":
                self._step(name, operation, rest)
        return None

    def _phi(self, rest: str, came: dict[str, np.ndarray]) -> np.ndarray:
        kind, pairs = re.match(rf"({_TYPE}) (.*)", rest).groups()  # type: ignore[union-attr]
        result = None
        for value, source in re.findall(rf"\[ ({_OPERAND}), (%\d+) \]", pairs):
            # The first block has no label of its own.
            taken = came.get(source, np.zeros(THREADS, dtype=bool))
            found = self._value(f"{kind} {value}") if taken.any() else None
            if found is not None:
                mask = taken.reshape(-1, *[1] * (found.ndim - 1))
                result = found.copy() if result is None else np.where(mask, found, result)
        assert result is not None
        return result

    def _step(self, name: str, operation: str, rest: str) -> None:
        rest = _FLAGS.sub("", rest)
        with np.errstate(all="ignore"):
            found = getattr(self, f"_{operation}", None)
            if found is not None:
                value = found(rest)
            elif operation in _BINARY:
                kind, left, right = re.match(rf"({_TYPE}) ({_OPERAND}), ({_OPERAND})", rest).groups()  # type: ignore[union-attr]
                pair = [self._value(f"{kind} {each}") for each in (left, right)]
                value = _BINARY[operation](*pair).astype(pair[0].dtype)
            elif operation in _CASTS:
                kind, source, to = re.match(rf"({_TYPE}) ({_OPERAND}) to ({_TYPE})", rest).groups()  # type: ignore[union-attr]
                value = _CASTS[operation](self._value(f"{kind} {source}"), to)
            else:
                raise NotImplementedError(f"{operation} {rest}")
        if name:
            self._values[name] = value

    def _value(self, text: str) -> np.ndarray:
        """Such as "i32 %5" or "<4 x i32> zeroinitializer"."""
        found = _VALUE.match(text.strip())
        assert found is not None, text
        kind, operand = found.groups()
        if operand.startswith("%"):
            return self._values[operand]  # type: ignore[return-value]
        if operand.startswith("@"):
            return np.zeros(THREADS, dtype=np.int64)
        vector = re.match(r"<(\d+) x (\w+)>", kind)
        dtype = _DTYPES[vector[2] if vector else kind]
        shape = (THREADS, int(vector[1])) if vector else (THREADS,)
        if operand.startswith("<"):
            numbers = [_number(each.split(" ")[1], dtype) for each in operand[1:-1].split(", ")]
            return np.broadcast_to(np.array(numbers, dtype=dtype), shape)
        number = 0 if operand in ("poison", "zeroinitializer", "undef") else _number(operand, dtype)
        return np.full(shape, number, dtype=dtype)

    def _icmp(self, rest: str) -> np.ndarray:
        how, kind, left, right = re.match(rf"(\w+) ({_TYPE}) ({_OPERAND}), ({_OPERAND})", rest).groups()  # type: ignore[union-attr]
        one, other = self._value(f"{kind} {left}"), self._value(f"{kind} {right}")
        if how.startswith("u"):
            one, other = (each.view(f"u{each.dtype.itemsize}") for each in (one, other))
        return _COMPARISONS[how[-2:]](one, other)

    def _select(self, rest: str) -> np.ndarray:
        condition, one, other = (self._value(each) for each in _split(rest))
        return np.where(condition.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    def _extractelement(self, rest: str) -> np.ndarray:
        vector, place = _split(rest)
        return self._value(vector)[:, int(place.split(" ")[1])]

    def _insertelement(self, rest: str) -> np.ndarray:
        vector, value, place = _split(rest)
        result = self._value(vector).copy()
        result[:, int(place.split(" ")[1])] = self._value(value)
        return result

    def _shufflevector(self, rest: str) -> np.ndarray:
        one, other, mask = _split(rest)
        both = np.concatenate([self._value(one), self._value(other)], axis=1)
        return both[:, self._value(mask)[0]]

    def _getelementptr(self, rest: str) -> np.ndarray:
        kind, base, at = _split(rest)
        return self._value(base) + self._value(at).astype(np.int64) * _DTYPES[kind].itemsize

    def _load(self, rest: str) -> np.ndarray:
        kind, place = _split(rest)[:2]
        vector = re.match(r"<(\d+) x (\w+)>", kind)
        count, dtype = (int(vector[1]), _DTYPES[vector[2]]) if vector else (1, _DTYPES[kind])
        at = self._value(place)
        if "addrspace(3)" in place:
            words = at[self._active, None] // 4 + np.arange(count)
            loaded = self._lds.load(words, _WAVE[self._active])
        else:
            loaded = self._memory(at, count, dtype)
        result = np.zeros((THREADS, count), dtype=dtype)
        result[self._active] = loaded
        return result if vector else result[:, 0]

    def _memory(self, at: np.ndarray, count: int, dtype: np.dtype) -> np.ndarray:
        tensor, byte = self._tensor(at[self._active])
        whole = tensor.reshape(-1).view(dtype)
        places = byte[:, None] // dtype.itemsize + np.arange(count)
        assert byte.min() >= 0, "a load from before a tensor"
        assert places.max() < len(whole), "a load from beyond a tensor"
        return whole[places]

    def _tensor(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        number = np.unique(at // _SPACE)
        assert number.tolist() in [[each + 1] for each in range(len(self._tensors))], "an address outside all tensors"
        return self._tensors[number[0] - 1], at % _SPACE

    def _store(self, rest: str) -> None:
        source, place = _split(rest)[:2]
        values, at = self._value(source)[self._active], self._value(place)[self._active]
        if "addrspace(3)" in place:
            words = at[:, None] // 4 + np.arange(values.shape[1])
            self._lds.store(words, values.view(np.int32), _WAVE[self._active])
            return
        tensor, byte = self._tensor(at)
        places = byte[:, None] // 4 + np.arange(values.shape[1])
        assert len(np.unique(places)) == places.size, "two threads write one number"
        tensor.reshape(-1)[places] = values

    def _fence(self, rest: str) -> None:
        """Orders what goes on in turns here anyway."""

    def _call(self, rest: str) -> object:
        name, arguments = re.search(r"@llvm\.([\w.]+)\((.*)\)$", rest).groups()  # type: ignore[union-attr]
        values = [self._value(each) for each in _split(arguments)] if arguments else []
        return _CALLS[name.removeprefix("amdgcn.")](self, *values)

    def _buffer(self, pointer: np.ndarray, _: np.ndarray, size: np.ndarray, __: np.ndarray) -> np.ndarray:
        return np.stack([pointer, size], axis=1)

    def _buffer_load(self, buffer: np.ndarray, offset: np.ndarray, scalar: np.ndarray, dtype: str, count: int):
        size = _DTYPES[dtype].itemsize * count
        byte = offset.astype(np.int64) % (1 << 32) + scalar
        inside = (byte + size <= buffer[:, 1]) & self._active
        assert (inside == ((byte < buffer[:, 1]) & self._active)).all(), "a load across the end of a buffer"
        result, active = np.zeros((THREADS, count), dtype=_DTYPES[dtype]), self._active
        if inside.any():
            self._active = inside
            result[inside] = self._memory(buffer[:, 0] + byte, count, _DTYPES[dtype])
            self._active = active
        return result if count > 1 else result[:, 0]

    def _matrix(self, left: np.ndarray, right: np.ndarray, total: np.ndarray, *_: np.ndarray) -> np.ndarray:
        assert self._active.all()
        factors = [each.view(np.uint32).reshape(-1, 64, 2).astype(np.uint64) for each in (left, right)]
        waves = zip(*factors, total.reshape(-1, 64, 4), strict=True)
        return np.concatenate([matrix_instruction(*wave) for wave in waves]).astype(np.int32)

    def _barrier(self) -> None:
        assert self._active.all()
        self._lds.barriers += 1

    def _first_lane(self, value: np.ndarray) -> np.ndarray:
        return np.repeat(value[::64], 64)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    return [each.strip() for each in re.split(r",(?![^<(]*[>)])", text)]


def _number(text: str, dtype: np.dtype) -> object:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("f0x"):
        return np.array(int(text[1:], 16), dtype=np.uint32).view(np.float32)
    if text.startswith("0x"):
        return np.array(int(text, 16), dtype=np.uint64).view(np.float64).astype(np.float32)
    if dtype.kind == "f":
        return float(text)
    return np.array(int(text) & ((1 << 64) - 1), dtype=np.uint64).astype(dtype)


def _quotient(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.sign(left) * np.sign(right) * (np.abs(left) // np.abs(right))


_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "shl": np.left_shift, "ashr": np.right_shift, "sdiv": _quotient,
    "lshr": lambda x, y: (x.view(f"u{x.dtype.itemsize}") >> y.view(f"u{y.dtype.itemsize}")).view(x.dtype),
    "srem": lambda x, y: x - _quotient(x, y) * y,
    "fadd": np.add, "fsub": np.subtract, "fmul": np.multiply, "fdiv": np.divide,
}  # fmt: skip
_COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _bitcast(value: np.ndarray, to: str) -> np.ndarray:
    vector = re.match(r"<(\d+) x (\w+)>", to)
    raw = np.ascontiguousarray(value).reshape(THREADS, -1).view(_DTYPES[vector[2] if vector else to])
    return raw if vector else raw[:, 0]


def _unsigned(value: np.ndarray, to: str) -> np.ndarray:
    wide = value if value.dtype == bool else value.view(f"u{value.dtype.itemsize}")
    return wide.astype(_DTYPES[to])


_CASTS: dict[str, Callable[[np.ndarray, str], np.ndarray]] = {
    "sext": lambda value, to: value.astype(_DTYPES[to]),
    "trunc": lambda value, to: value.astype(_DTYPES[to]),
    "sitofp": lambda value, to: value.astype(np.float32),
    "zext": _unsigned,
    "bitcast": _bitcast,
}
_CALLS: dict[str, Callable[..., object]] = {
    "workitem.id.x": lambda machine: np.arange(THREADS, dtype=np.int32),
    "workgroup.id.x": lambda machine: np.full(THREADS, machine._program[0], dtype=np.int32),
    "workgroup.id.y": lambda machine: np.full(THREADS, machine._program[1], dtype=np.int32),
    "make.buffer.rsrc.p8.p1": Machine._buffer,
    "raw.ptr.buffer.load.v4i32": lambda machine, *given: machine._buffer_load(*given[:3], "i32", 4),
    "raw.ptr.buffer.load.i16": lambda machine, *given: machine._buffer_load(*given[:3], "i16", 1),
    "readfirstlane.i32": Machine._first_lane,
    "mfma.i32.16x16x32.i8": Machine._matrix,
    "s.barrier": Machine._barrier,
    "sched.barrier": lambda machine, mask: None,
    "smax.i32": lambda machine, one, other: np.maximum(one, other),
    "maximum.f32": lambda machine, one, other: np.maximum(one, other),
    "minimum.f32": lambda machine, one, other: np.minimum(one, other),
}
