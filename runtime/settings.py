"""`Settings`: what a user sets, as a struct of named fields; and calls that are given such settings.

A call that names an argument which there is not, or leaves out one that is needed, is refused in one sentence that says
what was given and what there is. Whether the values have the right types is said by argument_types.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

import msgspec

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class WrongCall(TypeError, ValueError):
    """A call that names an argument which there is not, or leaves out one that is needed: Python's `TypeError`, and a
    `ValueError` like everything else that is refused here."""


class _SettingsMeta(msgspec.StructMeta):
    if not TYPE_CHECKING:  # which is to see the fields

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().__call__(*args, **kwargs)
            except TypeError:
                problem = _misfit(cls.__name__, cls, args, kwargs, cls.elsewhere)
                if problem is None:
                    raise
            raise WrongCall(problem)


class Settings(msgspec.Struct, metaclass=_SettingsMeta, frozen=True):
    """Base of all settings. A call with other names than the fields' is a `WrongCall`, which msgspec alone would put in
    words that name neither the class nor its fields."""

    elsewhere: ClassVar[frozenset[str]] = frozenset()
    """Names that users of other servers look for, and that there are not here."""


def check_settings(given: Mapping[str, Any], whose: str, kind: type[Settings]) -> None:
    """Raises `WrongCall` for names that are no fields of `kind`."""
    fields = kind.__struct_fields__
    if unknown := {name: value for name, value in given.items() if name not in fields}:
        raise WrongCall(f"{whose} is given {_listed(unknown, kind.elsewhere)}, expected {', '.join(fields)}")


def takes(parameter: str, kind: type[Settings]) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """For a function that is given its options as one object, `parameter`, of class `kind`.

    A call that does not fit is a `WrongCall` that says how it is meant, above all when the options themselves were
    given. One that fits costs nothing but the way through here.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        called = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except TypeError:
                problem = _misfit(called, function, args, kwargs, kind.elsewhere, {parameter: kind})
                if problem is None:
                    raise
            raise WrongCall(problem)

        return call

    return decorate


def _misfit(
    called: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    elsewhere: frozenset[str],
    settings: Mapping[str, type[Settings]] | None = None,
) -> str | None:
    """Why a call does not fit the function's parameters, and what would; None if it does. `settings` are those of the
    parameters that are such objects."""
    signature = inspect.signature(function)
    names = [name for name in signature.parameters if name != "self"]
    expected = ", ".join(names)
    if unknown := {name: value for name, value in kwargs.items() if name not in names}:
        for parameter, kind in (settings or {}).items():
            if unknown.keys() <= set(kind.__struct_fields__):
                expected = f"{parameter}={kind.__name__}({_listed(unknown)})"
        return f"{called} is given {_listed(unknown, elsewhere)}, expected {expected}"
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = {*list(signature.parameters)[: len(args)], *kwargs}
        for name in names:
            if name not in given and signature.parameters[name].default is inspect.Parameter.empty:
                if settings and name in settings:
                    expected = f"{settings[name].__name__}(...)"
                return f"{called} is given no {name}, expected {expected}"
        return f"{called}: {error}, expected {expected}"
    return None


def _listed(options: Mapping[str, Any], elsewhere: frozenset[str] = frozenset()) -> str:
    return ", ".join(
        f"{name}={value!r}{' (which hotset does not have)' if name in elsewhere else ''}"
        for name, value in options.items()
    )
