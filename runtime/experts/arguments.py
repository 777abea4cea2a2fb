"""Whose tokens want which experts, as it is given to an `ExpertCache`: made into what the arena takes, or refused."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hotset.runtime.argument_types import integers
from hotset.runtime.expert_pins import Int32
from hotset.runtime.experts.reader import Demand
from hotset.runtime.plan import DEMAND_WORDS
from hotset.shm.demands import HEADER_WORDS


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
