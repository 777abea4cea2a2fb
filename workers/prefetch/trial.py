"""Whether prefetching pays: steps with and without it, timed in turn."""

from __future__ import annotations

import math

BLOCK = 4  # steps in a row with, or without
PAIRS = 6  # of blocks, of one trial
HOLD = 512  # steps for which its result holds
MEMORY = 32  # pairs; earlier ones are forgotten


class Trial:
    """Every now and then runs `PAIRS` pairs of blocks, each a block with prefetching and one without, and holds to what
    was faster until the next trial. Later trials add to what earlier ones found: single steps differ by more than
    prefetching changes.

    A pair counts only if all of its steps have the same number of rows.
    """

    def __init__(self) -> None:
        self._decided = True  # what holds
        self._held = HOLD  # steps since the last trial
        self._pairs_left = 0
        self._times = [0, 0]  # nanoseconds of the current pair's blocks
        self._steps = 0  # of the current pair that are done
        self._rows = 0  # of each of them
        self._first = False  # whether the first block of the current pair prefetches: they change places
        self._mean = 0.0  # of the logarithm of the times' ratio, with to without
        self._count = 0

    @property
    def is_on(self) -> bool:
        """Whether the next step is to prefetch."""
        return (self._steps < BLOCK) == self._first if self._pairs_left else self._decided

    def note(self, nanoseconds: int, rows: int) -> None:
        """How long a step took, and how many rows it had."""
        if not self._pairs_left:
            self._held += 1
            if self._held >= HOLD:
                self._held, self._pairs_left = 0, PAIRS
                self._begin_pair()
            return
        if self._steps and rows != self._rows:
            self._begin_pair()
            return
        self._rows = rows
        self._times[self._steps // BLOCK] += nanoseconds
        self._steps += 1
        if self._steps == 2 * BLOCK:
            self._end_pair()

    def _begin_pair(self) -> None:
        self._times = [0, 0]
        self._steps = 0
        self._first = not self._first

    def _end_pair(self) -> None:
        ratio = math.log(max(self._times[0], 1) / max(self._times[1], 1))
        self._count = min(self._count + 1, MEMORY)
        self._mean += ((ratio if self._first else -ratio) - self._mean) / self._count
        self._pairs_left -= 1
        self._decided = self._mean <= 0
        self._begin_pair()
