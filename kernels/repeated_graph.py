"""A graph for backends that record nothing: it runs its function again and copies the results to where they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Generic, TypeVar

from torch import Tensor

R = TypeVar("R")


class RepeatedGraph(Generic[R]):
    """`Graph` of a function whose result is a tensor, None, or tuples, lists, dicts and dataclasses of them."""

    def __init__(self, run: Callable[[], R]) -> None:
        self._run = run
        self.result = run()

    def replay(self) -> None:
        """Runs the function again."""
        for old, new in zip(_tensors(self.result), _tensors(self._run()), strict=True):
            if old is not new:
                old.copy_(new)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
