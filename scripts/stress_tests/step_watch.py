"""Whether the workers of the routing stress test get on: one that does not has lost a request."""

from __future__ import annotations

import time
from collections.abc import Container

from stress_tests.arena_audit import ArenaAudit
from stress_tests.checks import Check, Scoreboard
from stress_tests.violations import Unrecoverable, Violations

from hotset.shm import _core
from hotset.shm.counters import Counter
from hotset.shm.layout import Section


class StepWatch:
    """Looks at the workers' counts of steps. A worker in a step waits for nothing but experts, so without a step for
    `patience` seconds, the pager running, its request is lost.
    """

    def __init__(
        self,
        arena: _core.Arena,
        num_workers: int,
        audit: ArenaAudit,
        scoreboard: Scoreboard,
        violations: Violations,
        patience: float,
    ) -> None:
        self._arena = arena
        self._audit = audit
        self._scoreboard = scoreboard
        self._violations = violations
        self._patience = patience
        self._steps = [0] * num_workers
        self._last_step = [time.monotonic()] * num_workers

    def begin(self, process: int) -> None:
        """The worker may take steps from now on."""
        self._last_step[process] = time.monotonic()

    def look(self, working: Container[int], pager_ready_since: float | None) -> None:
        """Raises `Unrecoverable` once one of `working` has not taken a step for too long."""
        now = time.monotonic()
        for process in range(len(self._steps)):
            steps = self._arena.load_u64(Section.COUNTERS, process, Counter.STEPS)
            if steps != self._steps[process]:
                self._scoreboard.checked(Check.REQUESTS)
            if steps != self._steps[process] or process not in working:
                self._last_step[process] = now
            self._steps[process] = steps
            if pager_ready_since is not None:
                self._check_wait(process, now - max(self._last_step[process], pager_ready_since))

    def _check_wait(self, process: int, waited: float) -> None:
        if waited <= self._patience:
            return
        pins = self._audit.pins_of(process)
        asked = sorted(set(self._arena.urgent_requests()) & set(pins))
        self._violations.report(
            Check.REQUESTS,
            f"worker {process} has waited {waited:.1f} s, with the pager running, for the experts {pins}; "
            f"of those {asked} are asked for",
        )
        raise Unrecoverable
