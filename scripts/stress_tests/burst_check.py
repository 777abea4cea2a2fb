"""A short burst of routing that nobody disturbs: affinity and counts are recomputed from the workers' logs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from stress_tests.affinity_replay import TOLERANCE, WorkerLog, replay
from stress_tests.arena_counters import ArenaCounters
from stress_tests.checks import Check, Scoreboard
from stress_tests.violations import Violations

from hotset.runtime.affinity import ExpertAffinity
from hotset.shm.counters import Counter


class BurstCheck:
    """Makes bursts, and compares.

    Attributes:
        calls: that were recomputed; `ambiguous` of them fit the epochs in several ways.
        largest_error: of a score.
    """

    def __init__(
        self, affinity: ExpertAffinity, counters: ArenaCounters, scoreboard: Scoreboard, violations: Violations
    ) -> None:
        self._affinity = affinity
        self._counters = counters
        self._scoreboard = scoreboard
        self._violations = violations
        self.calls = self.ambiguous = 0
        self.largest_error = 0.0

    def run(self, burst: Callable[[], list[WorkerLog]]) -> None:
        """`burst` has all workers route, and returns their logs."""
        counters, violations = self._counters, self._violations
        scores, _ = self._affinity.snapshot()
        epochs, activations = counters.epochs(), counters.activations()
        tokens = counters.count(Counter.ROUTING_DECISIONS)
        logs = burst()
        end_scores, _ = self._affinity.snapshot()
        end_epochs = counters.epochs()
        expected = replay(self._affinity.config, scores.astype(np.float64), epochs, end_epochs, logs)
        self.calls += sum(len(log) for log, _ in logs)
        self.ambiguous += expected.ambiguous

        violations.report_all(Check.AFFINITY, expected.problems)
        error = np.maximum(end_scores - expected.highest, expected.lowest - end_scores)
        self.largest_error = max(self.largest_error, float(error.max()))
        self._scoreboard.checked(Check.AFFINITY, error.size)
        violations.report_all(
            Check.AFFINITY,
            [
                f"the score of expert {e} of layer {layer} is {end_scores[layer, e]:.6f}, in float64 "
                f"{expected.lowest[layer, e]:.6f} to {expected.highest[layer, e]:.6f}"
                for layer, e in np.argwhere(error > TOLERANCE).tolist()
            ],
        )
        self._scoreboard.checked(Check.COUNTS, error.size + epochs.size + 1)
        grown = counters.activations() - activations
        violations.report_all(
            Check.COUNTS,
            [
                f"expert {e} of layer {layer} was activated {grown[layer, e]} times, in the logs "
                f"{expected.activations[layer, e]} times"
                for layer, e in np.argwhere(grown != expected.activations).tolist()
            ],
        )
        if not np.array_equal(end_epochs - epochs, expected.epochs):
            violations.report(
                Check.COUNTS, f"the epochs grew by {end_epochs - epochs}, in the logs by {expected.epochs}"
            )
        routed = counters.count(Counter.ROUTING_DECISIONS) - tokens
        if routed != expected.tokens:
            violations.report(Check.COUNTS, f"{routed} tokens were counted, {expected.tokens} are in the logs")
