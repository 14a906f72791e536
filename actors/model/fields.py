"""Typed reading of a model's config.json: every refusal names the field and what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ConfigError(ValueError):
    """A model configuration that is malformed or not supported."""


class Fields:
    """One JSON object of a configuration; `path` is where it stands, for messages ("text_config")."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def name(self, key: str) -> str:
        """The field's full name, as messages print it."""
        return f"{self._path}.{key}" if self._path else key

    def get(self, key: str) -> Any:
        """The raw value, None when absent."""
        return self._values.get(key)

    def inner(self, key: str, values: Mapping[str, Any]) -> Fields:
        """The object that stands under `key`."""
        return Fields(values, self.name(key))

    def integer(self, key: str, minimum: int, maximum: int | None = None) -> int:
        """A required integer within [minimum, maximum]."""
        value = self._required(key, "an integer")
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.name(key)}: expected an integer, found {value!r}")
        if value < minimum or (maximum is not None and value > maximum):
            bound = f"at least {minimum}" if maximum is None else f"within {minimum}..{maximum}"
            raise ConfigError(f"{self.name(key)}: expected {bound}, found {value}")
        return value

    def number(self, key: str, above: float, default: float | None = None) -> float:
        """A number greater than `above`; required unless there is a default."""
        if default is not None and self.get(key) is None:
            return default
        value = self._required(key, "a number")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{self.name(key)}: expected a number, found {value!r}")
        if not above < value < float("inf"):
            raise ConfigError(f"{self.name(key)}: expected a number above {above:g}, found {value}")
        return float(value)

    def boolean(self, key: str) -> bool:
        """A required boolean."""
        value = self._required(key, "true or false")
        if not isinstance(value, bool):
            raise ConfigError(f"{self.name(key)}: expected true or false, found {value!r}")
        return value

    def token(self, key: str, vocab_size: int) -> int | None:
        """An optional token id."""
        return None if self.get(key) is None else self.integer(key, 0, vocab_size - 1)

    def tokens(self, key: str, vocab_size: int) -> tuple[int, ...]:
        """An optional token id or list of them."""
        value = self.get(key)
        if not isinstance(value, list):
            token = self.token(key, vocab_size)
            return () if token is None else (token,)
        return tuple(Fields({key: item}, self._path).integer(key, 0, vocab_size - 1) for item in value)

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a value other than those flyray implements; the field may be absent."""
        value = self.get(key)
        if key in self._values and not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            raise ConfigError(f"{self.name(key)}: {value!r} is not supported; {' or '.join(map(repr, allowed))} is")

    def _required(self, key: str, expected: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"{self.name(key)}: missing; expected {expected}")
        return value
