"""What the pager keeps from one run of a model to the next: which experts were worth most (warm_start.py), and what td
eviction has learned (eviction/learned.py). Both are written beside its work, now and then and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from hotset.workers.eviction.learned import LearnedKeeper
from hotset.workers.warm_start import WarmStart

LEARNED_SAVE_SECONDS = 60.0  # of which a kill can lose so much


class Kept:
    """Says when which of the two is written, and what went wrong with them.

    Args:
        resident: experts in memory, the one that is worth most first.
        tell: is told of problems, in one sentence or several.
    """

    def __init__(
        self,
        warm_start: WarmStart,
        learned: LearnedKeeper,
        resident: Callable[[], Iterable[int]],
        tell: Callable[[str], None],
    ) -> None:
        self._warm_start = warm_start
        self._learned = learned
        self._resident = resident
        self._tell = tell
        self._next_learned_save = time.monotonic() + LEARNED_SAVE_SECONDS

    def save_if_due(self) -> None:
        if self._warm_start.is_save_due():
            self._warm_start.save(self._resident())
        if time.monotonic() >= self._next_learned_save:
            self._learned.save(wait=False)
            self._next_learned_save = time.monotonic() + LEARNED_SAVE_SECONDS

    def save_all(self) -> None:
        """Returns when both are written."""
        self._warm_start.save(self._resident(), wait=True)
        self._learned.save(wait=True)
        self.tell_problems()

    def tell_problems(self) -> None:
        problems = [problem for kept in (self._warm_start, self._learned) if (problem := kept.take_problem())]
        if problems:
            self._tell("; ".join(problems))
