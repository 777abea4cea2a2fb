"""How a worker gets at the experts of a step: resident ones first, missing ones meanwhile, as far as its pins go.

The steps of the protocol, from the pin to the wait, are runtime/expert_pins.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from hotset.runtime.expert_pins import ExpertPins
from hotset.runtime.expert_pins import ExpertUnavailable as ExpertUnavailable
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
        """Yields (expert, slot) of every expert, in lists of those that can be used at once, resident ones first.

        They are pinned until the next list is asked for, and those that are missing are requested before the first is
        given. `meanwhile` is called once, in between.

        Raises `ExpertUnavailable`; the pins that are then still set are the caller's to clear (`Arena.unpin_all`).
        """
        free_pins = list(range(self._pins))
        pinned: dict[int, int] = {}  # expert -> pin
        waiting: list[int] = []  # of them
        remaining = list(reversed(experts))
        while remaining or waiting:
            new: dict[int, int] = {}
            while remaining and free_pins and remaining[-1] not in pinned:
                expert = remaining.pop()
                pinned[expert] = new[expert] = free_pins.pop()
            found, missed = self.pin(layer, new)
            waiting += missed
            if meanwhile is not None:
                meanwhile()
                meanwhile = None
            if not found:
                found = self.wait(layer, waiting)
                arrived = {expert for expert, _ in found}
                waiting = [expert for expert in waiting if expert not in arrived]
            yield found
            pins = [pinned.pop(expert) for expert, _ in found]
            self.unpin(pins)
            free_pins += pins

    def count_left_out(self, count: int) -> None:
        """Of a layer's step: experts in memory that were selected, and are not computed. They count as hits."""
        self._arena.count(self._process, self._hit_counter, count)
        self._arena.count(self._process, Counter.EXPERTS_LEFT_OUT, count)

    def count_trial(self, with_it: int, without: int) -> None:
        """Nanoseconds of steps that prefetched, and of as many that did not."""
        self._arena.count(self._process, Counter.TRIAL_NANOSECONDS_WITH, with_it)
        self._arena.count(self._process, Counter.TRIAL_NANOSECONDS_WITHOUT, without)
