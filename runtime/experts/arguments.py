"""Experts and streams as they are given to an `ExpertCache`: made into what the arena takes, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from hotset.runtime.argument_types import integers
from hotset.runtime.expert_pins import Int32
from hotset.runtime.experts.reader import Demand
from hotset.runtime.plan import DEMAND_WORDS
from hotset.shm.demands import HEADER_WORDS


def expert_rows(name: str, given: Any, num_experts: int) -> Int32:
    """Experts of one token, or [tokens, n]: as [tokens, n]."""
    rows = _integers(given)
    if rows is None:
        raise ValueError(f"{name} is {given!r}, expected integers: the experts of one token, or a row for each token")
    wrong = rows[(rows < 0) | (rows >= num_experts)]
    if wrong.size:
        raise ValueError(f"expert id is {wrong[0]}, expected 0 <= id < {num_experts}")
    return np.ascontiguousarray(np.atleast_2d(rows), np.int32)


def _integers(given: Any) -> np.ndarray[Any, Any] | None:
    """None if they are none, or have more than two axes."""
    if not isinstance(given, np.ndarray):
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping):
            return None
        try:
            given = np.asarray(list(cast("Iterable[Any]", given)))
        except ValueError:  # rows of different lengths
            return None
        if not given.size and given.ndim == 1:
            given = given.astype(np.int32)
    rows = cast("np.ndarray[Any, Any]", given)
    return rows if rows.dtype.kind in "iu" and rows.ndim in (1, 2) else None


def distinct(rows: Int32) -> tuple[int, ...]:
    """The experts of all rows; of one row in its order."""
    if len(rows) == 1:
        return tuple(dict.fromkeys(rows[0].tolist()))
    return tuple(np.unique(rows).tolist())


def demand_of(rows: Int32, streams: Iterable[int] | None, first: int, most: int, *, prefill: bool) -> Demand:
    """`streams`: whose token each row is, below `most`; None is 0, 1 ... as far as that goes.

    Of all processes' streams this one's begin with number `first`.
    """
    whose: list[int] | None = None
    if streams is not None:
        whose = integers("streams", streams)
        if len(whose) != len(rows):
            raise ValueError(
                f"streams is {whose}, expected one for each row of experts, of which there are {len(rows)}"
            )
        if wrong := [stream for stream in whose if not 0 <= stream < most]:
            raise ValueError(f"stream is {wrong[0]}, expected 0 <= stream < {most}, which is the setting streams")
    elif len(rows) <= most:
        whose = [*range(len(rows))]
    if prefill or whose is None or HEADER_WORDS + rows.size + len(rows) > DEMAND_WORDS // 2:
        return Demand(np.unique(rows)[np.newaxis], None)
    return Demand(rows, np.array(whose, np.int32) + np.int32(first))
