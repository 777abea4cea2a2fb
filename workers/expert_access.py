"""How a worker gets at the experts of a step: the residency protocol (runtime/expert_pins.py) with a row of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hotset.runtime.expert_pins import ExpertPins
from hotset.shm.counters import Counter


class ExpertAccess(ExpertPins):
    """Of one worker, which has its whole row of pins for the step that it computes."""

    def resident(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yields (expert, slot) of every expert, one by one; see `resident_together`."""
        for together in self.resident_together(layer, experts):
            yield from together

    def resident_together(
        self, layer: int, experts: Sequence[int], meanwhile: Callable[[], None] | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        """`in_turn` with all pins of the row; those that an error leaves are for the caller's `Arena.unpin_all`."""
        return self.in_turn(layer, experts, list(range(self._pins)), meanwhile)

    def count_left_out(self, count: int) -> None:
        """Of a layer's step: experts in memory that were selected, and are not computed. They count as hits."""
        self._arena.count(self._process, self._hit_counter, count)
        self._arena.count(self._process, Counter.EXPERTS_LEFT_OUT, count)

    def count_trial(self, with_it: int, without: int) -> None:
        """Nanoseconds of steps that prefetched, and of as many that did not."""
        self._arena.count(self._process, Counter.TRIAL_NANOSECONDS_WITH, with_it)
        self._arena.count(self._process, Counter.TRIAL_NANOSECONDS_WITHOUT, without)
