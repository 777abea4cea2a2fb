"""The keys of a config.json, each with its type, and a clear error for a value that makes no sense."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

from hotset.runtime.model.errors import CorruptCheckpoint, UnsupportedModel


class ConfigFile:
    """A JSON object on disk. `null` counts as absent; `where` names an object inside another one."""

    def __init__(self, path: Path, values: dict[str, Any], where: str = "") -> None:
        self.path = path
        self._values = values
        self._where = where

    @classmethod
    def read(cls, path: Path) -> Self:
        try:
            return cls(path, msgspec.json.decode(path.read_bytes(), type=dict[str, Any]))
        except (msgspec.DecodeError, OSError) as error:
            raise CorruptCheckpoint(path, f"{path} cannot be read as a JSON object: {error}.") from error

    @classmethod
    def read_if_there(cls, path: Path) -> Self:
        """An empty object if there is no such file."""
        return cls.read(path) if path.is_file() else cls(path, {})

    def get(self, key: str, default: object = None) -> object:
        value = self._values.get(key)
        return default if value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def section(self, *keys: str) -> ConfigFile:
        """The object under the first of `keys` that is there, else an empty one."""
        key = next((key for key in keys if self.get(key) is not None), keys[0])
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self._nonsense(key, value, "an object")
        return ConfigFile(self.path, value, f"{key}.")  # pyright: ignore[reportUnknownArgumentType]

    def count(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self._required(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._nonsense(key, value, "a positive integer")
        return value

    def count_or_zero(self, key: str) -> int:
        """An integer of at least 1, or 0, which is what it is where it is not given."""
        return 0 if self.get(key, 0) == 0 else self.count(key)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number over 0."""
        value = self._required(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self._nonsense(key, value, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._nonsense(key, value, "true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers, or one that stands alone."""
        value = self.get(key, ())
        try:
            return (value,) if isinstance(value, int) else msgspec.convert(value, tuple[int, ...])
        except msgspec.ValidationError as error:
            raise self._nonsense(key, value, "an integer or a list of them") from error

    def token(self, key: str) -> str:
        """A special token, which stands as text or as an object with its text; "" if there is none."""
        value = self.get(key, "")
        return str(self.section(key).get("content", "") if isinstance(value, dict) else value)

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.get(key, ())
        try:
            return msgspec.convert(value, tuple[str, ...])
        except msgspec.ValidationError as error:
            raise self._nonsense(key, value, "a list of strings") from error

    def refuse_unless(self, option: str, value: object, supported: Iterable[object]) -> None:
        """Raises `UnsupportedModel` naming `option` if `value` is not among `supported`."""
        supported = tuple(supported)
        if value not in supported:
            choices = " or ".join("none" if choice is None else str(choice) for choice in supported)
            raise UnsupportedModel(
                self.path, option, f"{self.path}: {option} is {value!r}; hotset supports only {choices}."
            )

    def corrupt(self, problem: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(self.path, f"{self.path}: {problem}.")

    def _required(self, key: str, default: object) -> object:
        value = self.get(key, default)
        if value is None:
            raise CorruptCheckpoint(self.path, f"{self.path} does not give {self._where}{key}.")
        return value

    def _nonsense(self, key: str, value: object, expected: str) -> CorruptCheckpoint:
        return self.corrupt(f"{self._where}{key} is {value!r}, expected {expected}")
