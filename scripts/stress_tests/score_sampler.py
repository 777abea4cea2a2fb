"""INV-2: a score never rises without an activation, watched from outside while others route."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import numpy.typing as npt
from stress_tests.checks import Check, Scoreboard

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.shm.segment import Segment

EXPLAINED_WITHIN_SECONDS = 1.0  # by a worker that lost its processor between merging and counting
ROUNDING = 2**-20  # of decays, 16 units of a slot


class _Rise(msgspec.Struct):
    began: float
    seen: float
    amount: float
    activations: int  # counted before `began`


class ScoreSampler:
    """Compares each affinity snapshot with the one before.

    A call merges first and counts its activations afterwards, and each of them is worth one boost at most. So a rise
    between two snapshots is explained once so many more are counted than before the first of the two; that may be a
    moment later. A worker that is killed in between leaves the activations of one expert uncounted: for each death one
    unexplained rise around the time of it is allowed.

    Attributes:
        uncounted: rises that were put down to a killed worker.
    """

    def __init__(self, segment: Segment, process: int, scoreboard: Scoreboard) -> None:
        self._arena = segment.arena
        geometry = segment.layout.geometry
        self._affinity = ExpertAffinity(AffinityConfig(geometry.num_experts), segment=segment, process=process)
        self._scoreboard = scoreboard
        self._shape = (geometry.num_layers, geometry.num_experts)
        self._rises: dict[tuple[int, int], _Rise] = {}
        self._deaths: list[float] = []
        self.uncounted = 0
        self._activations = self._count()
        self._time = time.monotonic()
        self._scores, self._epochs = self._affinity.snapshot()
        self._activations_between = self._count()

    def _count(self) -> npt.NDArray[np.int64]:
        totals = np.empty(self._shape, np.uint64)
        self._arena.activation_totals(totals)
        return totals.astype(np.int64)

    def worker_died(self) -> None:
        self._deaths.append(time.monotonic())

    def sample(self) -> list[str]:
        """Takes a snapshot; what it shows to be wrong."""
        now = time.monotonic()
        scores, epochs = self._affinity.snapshot()
        activations = self._count()
        self._scoreboard.checked(Check.SCORES, scores.size)
        problems: list[str] = []
        for layer, expert in np.argwhere(epochs < self._epochs).tolist():
            problems.append(f"the epoch of expert {expert} of layer {layer} went back")
        for layer, expert in np.argwhere(scores > self._scores + ROUNDING).tolist():
            rise = self._rises.setdefault(
                (layer, expert), _Rise(self._time, now, 0.0, int(self._activations[layer, expert]))
            )
            rise.seen = now
            rise.amount += float(scores[layer, expert]) - float(self._scores[layer, expert])
        # What a snapshot is compared with: the one before, and the counts read before that one.
        self._time, self._scores, self._epochs = now, scores, epochs
        self._activations, self._activations_between = self._activations_between, activations
        problems += self._explain(activations, now)
        return problems

    def settle(self) -> list[str]:
        """With nobody routing: every rise must be explained now."""
        return self.sample() + self._explain(self._count(), time.monotonic() + EXPLAINED_WITHIN_SECONDS + 1)

    def _explain(self, activations: npt.NDArray[np.int64], now: float) -> list[str]:
        problems: list[str] = []
        for (layer, expert), rise in list(self._rises.items()):
            counted = int(activations[layer, expert]) - rise.activations
            if counted * self._affinity.config.activation_boost < rise.amount * (1 - 1e-6) - ROUNDING:
                if now - rise.seen < EXPLAINED_WITHIN_SECONDS:
                    continue
                died = next((t for t in self._deaths if rise.began - 0.1 <= t <= rise.seen + 0.5), None)
                if died is None:
                    problems.append(
                        f"the score of expert {expert} of layer {layer} rose by {rise.amount:.4f}, "
                        f"with {counted} activations"
                    )
                else:
                    self._deaths.remove(died)
                    self.uncounted += 1
            del self._rises[layer, expert]
        return problems
