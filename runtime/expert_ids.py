"""Experts as users name them, of an instance or an expert cache: made into ids, or refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def expert_rows(name: str, given: Any, num_experts: int) -> Int32:
    """Integers, or [tokens, n], in any iterable or array: as [tokens, n]. Raises `ValueError`, saying `name`."""
    rows = _integers(given)
    if rows is None:
        raise ValueError(f"{name} is {given!r}, expected integers, or rows of as many for each token")
    wrong = rows[(rows < 0) | (rows >= num_experts)]
    if wrong.size:
        raise ValueError(f"expert id is {wrong[0]}, expected 0 <= id < {num_experts}")
    return np.ascontiguousarray(np.atleast_2d(rows), np.int32)


def distinct(rows: Int32) -> tuple[int, ...]:
    """The experts of all rows; of one row in its order."""
    if len(rows) == 1:
        return tuple(dict.fromkeys(rows[0].tolist()))
    return tuple(np.unique(rows).tolist())


def distinct_experts(given: Any, num_experts: int) -> list[int]:
    """Each once, of what `expert_rows` takes."""
    return [*distinct(expert_rows("experts", given, num_experts))]


def _integers(given: Any) -> np.ndarray[Any, Any] | None:
    """None if they are none, or have more than two axes."""
    if not isinstance(given, np.ndarray):
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
            return None
        try:
            # As objects: of an int64 and an uint64 numpy would make floats.
            given = np.array(list(cast("Iterable[Any]", given)), dtype=object)
        except ValueError:  # rows that cannot be an array
            return None
    rows = cast("np.ndarray[Any, Any]", given)
    if rows.dtype.kind == "O":
        are_integers = all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in rows.flat)
    else:
        are_integers = rows.dtype.kind in "iu"
    return rows if are_integers and rows.ndim in (1, 2) else None
