"""How many expert slots there must be, so that nobody waits for ever, and what the others are for."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from hotset.runtime.errors import BudgetTooSmall
from hotset.runtime.expert_slots import (
    ExpertClass,
    all_nbytes,
    expert_budget_nbytes,
    least_slots,
    split_slots,
)
from hotset.shm.geometry import SlotClass

DEFAULT_READ_LANES = 4  # where there are slots enough


class SlotNeeds(msgspec.Struct, frozen=True):
    """Who holds slots at once. The user and every reader can hold all their pins, all of one size, and the pager still
    finds a slot to load into: else two readers that wait for each other's slots would wait for ever.

    Attributes:
        readers: processes that use experts.
        pins: the least of each of them.
        user_pins: experts that the user keeps in memory.
        read_lanes: slots that may be loading at once; None: as many as there are slots for, up to DEFAULT_READ_LANES.
        readers_in_words: as the user set them.
    """

    readers: int
    pins: int
    user_pins: int
    read_lanes: int | None
    readers_in_words: str

    @property
    def pinned(self) -> int:
        return self.readers * self.pins + self.user_pins

    @property
    def of_a_size(self) -> int:
        """The least slots of each size."""
        return self.pinned + (self.read_lanes or 1)

    def __str__(self) -> str:
        return f"{self.readers_in_words}, user_pins={self.user_pins} and read_lanes={self.read_lanes or 1}"

    def split(self, budget: str | int, classes: Sequence[ExpertClass]) -> tuple[SlotClass, ...]:
        """The slots that a budget holds. Raises `BudgetTooSmall`, or `ValueError` for what is no budget."""
        nbytes = expert_budget_nbytes(budget, classes)
        slots = split_slots(nbytes, classes, self.of_a_size)
        if slots is None:
            least = least_slots(classes, self.of_a_size)
            held = nbytes * sum(experts.count for experts in classes) // all_nbytes(classes)
            needed = sum(of_a_size.count for of_a_size in least)
            needed_nbytes = sum(of_a_size.count * of_a_size.nbytes for of_a_size in least)
            raise BudgetTooSmall(str(budget), held, needed, needed_nbytes, str(self))
        return slots

    def lanes(self, num_slots: int) -> int:
        """As many as asked for; by default fewer in a small pool, which is legal from one lane on."""
        return self.read_lanes or max(1, min(DEFAULT_READ_LANES, num_slots - self.pinned))

    def pins_of_a_reader(self, slots: Sequence[SlotClass], classes: Sequence[ExpertClass], num_experts: int) -> int:
        """At least `pins`, never more than a layer has experts; they take at most half of the slots of a size, unless
        its experts are all there anyway."""
        num_slots = sum(of_a_size.count for of_a_size in slots)
        contended = [
            of_a_size.count
            for of_a_size, experts in zip(slots, classes, strict=True)
            if of_a_size.count < experts.count
        ]
        free = min(contended, default=num_slots) - self.user_pins - self.lanes(num_slots)
        return min(num_experts, max(self.pins, free // (2 * self.readers)))
