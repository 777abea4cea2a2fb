"""Which process of the routing stress test is killed next, and which death nobody brought about."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stress_tests.checks import Check, Scoreboard
from stress_tests.messages import FromWorker
from stress_tests.violations import Unrecoverable, Violations

from hotset.runtime.messages.pager import FromPager
from hotset.runtime.supervision import Child

AT_START = 0.1  # share of the kills that may hit a process which is still starting
MAX_OWN_DEATHS = 5  # then whatever makes processes end on their own is known well enough


class Kills:
    """SIGKILLs to processes that `chance` chooses, wherever they are.

    Attributes:
        workers, pagers: killed so far.
        next_hits_anyone: the next victim may be a process that is still starting.
    """

    def __init__(self, scoreboard: Scoreboard, violations: Violations, chance: random.Random) -> None:
        self._scoreboard = scoreboard
        self._violations = violations
        self._chance = chance
        self._killed: set[int] = set()
        self._own_deaths = 0
        self.workers = self.pagers = 0
        self.next_hits_anyone = False

    def kill_one(self, workers: Sequence[Child[FromWorker]], pager: Child[FromPager]) -> bool:
        """Kills one of `workers`, or the pager; False if the one that was chosen is dying already."""
        victim = self._chance.choice([*workers, pager])
        if victim.pid in self._killed:
            return False
        self.next_hits_anyone = self._chance.random() < AT_START
        self._killed.add(victim.pid)
        victim.kill()
        if victim is pager:
            self.pagers += 1
        else:
            self.workers += 1
        return True

    def note_death(self, pid: int, who: str, how: str) -> None:
        """Of a process; it is a violation if it was not killed. Raises `Unrecoverable` when too many were not."""
        self._scoreboard.checked(Check.PROCESSES)
        if pid in self._killed:
            self._killed.remove(pid)
            return
        self._violations.report(Check.PROCESSES, f"{who} {how} on its own")
        self._own_deaths += 1
        if self._own_deaths >= MAX_OWN_DEATHS:
            raise Unrecoverable
