"""Whether what a user gives has the type that is asked for: one sentence otherwise, before anything is begun with it.

Annotations are enough for most of it: msgspec, which all settings are structs of, looks at types only when it decodes,
and a wrong one would be found in another process.
"""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union, cast, get_args, get_origin

import msgspec

_WORDS: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "True or False", type(None): "None"}
_PLURALS: dict[Any, str] = {int: "integers", float: "numbers", str: "texts", object: "anything"}


def check_field_types(struct: msgspec.Struct) -> None:
    """Raises `ValueError` for the first field that has not its declared type; makes Python's own numbers of numpy's."""
    for name, declared in _fields(type(struct)):
        given = getattr(struct, name)
        value = fitting(name, given, declared)
        if value is not given:
            msgspec.structs.force_setattr(struct, name, value)


def fitting(name: str, given: Any, declared: Any) -> Any:
    """`given`, or the same number as a Python number; raises `ValueError` if it is not of the declared type."""
    value = _fitting(given, declared)
    if value is _WRONG:
        raise ValueError(f"{name} is {given!r}, expected {_words(declared)}")
    return value


def check_instance(name: str, given: Any, kind: type) -> None:
    """Raises `ValueError` if `given` is not of this class."""
    if not isinstance(given, kind):
        raise ValueError(f"{name} is {given!r}, expected one of class {kind.__name__}")


def integer(name: str, given: Any, least: int | None = None, most: int | None = None) -> int:
    """`given` as an int; raises `ValueError` if it is none, or less than `least`, or more than `most`."""
    value = given if type(given) is int else _fitting(given, int)
    if value is _WRONG or (least is not None and value < least) or (most is not None and value > most):
        limits = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most}"
        raise ValueError(f"{name} is {given!r}, expected {_WORDS[int]}{limits}")
    return value


def check_integers(**given: Any) -> None:
    """Raises `ValueError` for the first that is no integer: for where a `TypeError` has said that one is not."""
    for name, value in given.items():
        integer(name, value)


def integers(name: str, given: Any) -> list[int]:
    """Every integer of an iterable; raises `ValueError` if it is none, or holds anything else."""
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
        raise ValueError(f"{name} is {given!r}, expected several integers")
    values = list(cast("Iterable[Any]", given))
    if set(map(type, values)) <= {int}:
        return values
    return [integer(f"one of {name}", value) for value in values]


_WRONG: Any = object()


@functools.cache
def _fields(kind: type[msgspec.Struct]) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    return [(name, hints[name]) for name in kind.__struct_fields__]


def _fitting(given: Any, declared: Any) -> Any:
    """`given`, or the same number as a Python number; `_WRONG` if it is not of the declared type."""
    origin = get_origin(declared)
    arguments: tuple[Any, ...] = get_args(declared)
    if origin in (Union, types.UnionType):
        return next((value for kind in arguments if (value := _fitting(given, kind)) is not _WRONG), _WRONG)
    if declared in (int, float) and isinstance(given, bool):
        return _WRONG
    if declared is int:
        return int(given) if isinstance(given, Integral) else _WRONG
    if declared is float:
        if not isinstance(given, Real):
            return _WRONG
        try:
            return float(cast("float", given))
        except OverflowError:
            return _WRONG
    if origin is Literal:
        return given if isinstance(given, str) and given in arguments else _WRONG
    if origin in (Sequence, tuple):
        if not isinstance(given, Sequence) or isinstance(given, str | bytes):
            return _WRONG
        members = [_fitting(member, arguments[0]) for member in cast("Sequence[Any]", given)]
        return _WRONG if _WRONG in members else tuple(members)
    if origin is dict:
        if not isinstance(given, Mapping):
            return _WRONG
        entries = [
            (_fitting(key, arguments[0]), _fitting(value, arguments[1]))
            for key, value in cast("Mapping[Any, Any]", given).items()
        ]
        return _WRONG if any(_WRONG in entry for entry in entries) else dict(entries)
    if origin is Callable:
        return given if callable(given) else _WRONG
    return given if isinstance(given, declared) else _WRONG


def _words(declared: Any) -> str:
    origin = get_origin(declared)
    arguments: tuple[Any, ...] = get_args(declared)
    if origin in (Union, types.UnionType):
        *others, last = [_words(kind) for kind in arguments]
        return f"{', '.join(others)} or {last}"
    if origin is Literal:
        return repr(arguments[0]) if len(arguments) == 1 else f"one of {', '.join(arguments)}"
    if origin in (Sequence, tuple):
        return f"several {_PLURALS[arguments[0]]}"
    if origin is dict:
        return f"a dict from {_PLURALS[arguments[0]]} to {_PLURALS[arguments[1]]}"
    if origin is Callable:
        return "something to call"
    name: str = declared.__name__
    return _WORDS.get(declared) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
