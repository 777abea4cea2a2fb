"""Whether prefetching pays: steps with and without it, timed in turn."""

from __future__ import annotations

import math
import statistics
from collections import deque

BLOCK = 4  # steps in a row with, or without
PAIRS = 6  # of blocks, of one trial
HOLD = 512  # steps for which its result holds, at first
LONGEST_HOLD = 8192  # ... and after trials that found again and again that prefetching does not pay
MEMORY = 32  # pairs; earlier ones are forgotten


class Trial:
    """Every now and then runs `PAIRS` pairs of blocks, each a block with prefetching and one without. Until the next
    trial all steps prefetch if those that did were faster by more than the standard error of the pairs seen so far;
    otherwise none does. Later trials add to what earlier ones found: single steps differ by more than prefetching
    changes. Each trial that ends against prefetching is followed by twice as many steps without one: trying costs, too,
    and where it never pays the share of steps that try goes to a third of a percent.

    A pair counts only if all of its steps have the same number of rows.
    """

    def __init__(self) -> None:
        self._decided = False  # what holds
        self._hold = HOLD  # steps from one trial to the next
        self._held = HOLD  # of them, those since the last trial
        self._pairs_left = 0
        self._times = [0, 0]  # nanoseconds of the current pair's blocks
        self._steps = 0  # of the current pair that are done
        self._rows = 0  # of each of them
        self._first = False  # whether the first block of the current pair prefetches: they change places
        self._ratios: deque[float] = deque(maxlen=MEMORY)  # logarithms, of the time with to that without

    @property
    def is_on(self) -> bool:
        """Whether the next step is to prefetch."""
        return (self._steps < BLOCK) == self._first if self._pairs_left else self._decided

    def note(self, nanoseconds: int, rows: int) -> tuple[int, int] | None:
        """How long a step took, and how many rows it had. If a pair ends with it: its nanoseconds with prefetching,
        and without."""
        if not self._pairs_left:
            self._held += 1
            if self._held >= self._hold:
                self._held, self._pairs_left = 0, PAIRS
                self._begin_pair()
            return None
        if self._steps and rows != self._rows:
            self._begin_pair()
            return None
        self._rows = rows
        self._times[self._steps // BLOCK] += nanoseconds
        self._steps += 1
        return self._end_pair() if self._steps == 2 * BLOCK else None

    def _begin_pair(self) -> None:
        self._times = [0, 0]
        self._steps = 0
        self._first = not self._first

    def _end_pair(self) -> tuple[int, int]:
        on, off = self._times if self._first else reversed(self._times)
        self._ratios.append(math.log(max(on, 1) / max(off, 1)))
        self._pairs_left -= 1
        if not self._pairs_left:
            error = statistics.stdev(self._ratios) / math.sqrt(len(self._ratios))
            self._decided = statistics.fmean(self._ratios) < -error
            self._hold = HOLD if self._decided else min(2 * self._hold, LONGEST_HOLD)
        self._begin_pair()
        return on, off
