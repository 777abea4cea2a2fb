"""The pager's expert slots: which expert lies in which, and who makes room for whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set

import numpy as np
import numpy.typing as npt

from hotset.shm import _core
from hotset.shm.counters import Counter
from hotset.shm.geometry import Geometry
from hotset.shm.layout import SlotState
from hotset.workers.eviction.policy import Eviction


class Slots:
    """Mirrors the slot words, of which this process is the only writer: `_expert_in_slot` (-1: none that is resident)
    and `_empty` (of each class). A slot that was taken is in neither until the main thread knows that its load was
    published, or it is freed: until then it is its lane's.

    Args:
        arena: of the instance, recovered.
        process: the pager's row.
        geometry: of the instance.
        class_of_expert: expert id -> class of the slots that it goes into.
        eviction: says who is worth least.
    """

    def __init__(
        self,
        arena: _core.Arena,
        process: int,
        geometry: Geometry,
        class_of_expert: Mapping[int, int],
        eviction: Eviction,
    ) -> None:
        self._arena = arena
        self._process = process
        self._eviction = eviction
        self._class_of_expert = class_of_expert
        self._class_of_slot = np.array(geometry.classes_of_slots, np.int64)
        self._slots_of_class = [self._class_of_slot == index for index in range(len(geometry.slot_classes))]
        self._expert_in_slot = np.full(geometry.num_slots, -1, np.int64)
        self._empty: list[list[int]] = [[] for _ in geometry.slot_classes]
        for slot in range(geometry.num_slots - 1, -1, -1):
            _, expert, state = arena.slot(slot)
            if state == SlotState.RESIDENT:
                self._expert_in_slot[slot] = expert
            else:
                self._empty[self._class_of_slot[slot]].append(slot)

    def class_of(self, expert: int) -> int:
        return self._class_of_expert[expert]

    def any_empty(self) -> bool:
        return any(self._empty)

    def resident(self) -> npt.NDArray[np.int64]:
        """The resident experts, the one that is worth most first."""
        resident = self._expert_in_slot[self._expert_in_slot >= 0]
        return resident[list(self._eviction.order(resident))[::-1]]

    # ---- to load into: the slot that is returned is LOADING, its request withdrawn

    def take_empty(self, expert: int) -> int | None:
        """An EMPTY slot of its class, for what nobody waits for."""
        return self._load_into(self._empty[self._class_of_expert[expert]][-1:], expert, urgent=False)

    def take(self, expert: int, awaited: Set[int]) -> int | None:
        """A slot of its class for `expert`, which somebody waits for. None if all experts in such slots are pinned.
        `awaited`: those that go last, as they were prefetched for a step that is to come."""
        slots: Iterable[int] = self._empty[self._class_of_expert[expert]][-1:]
        if not slots:
            slots = self._awaited_last(expert, awaited) if awaited else self._victims(expert)
        return self._load_into(slots, expert, urgent=True)

    def take_for_prefetch(self, expert: int, awaited: Set[int]) -> int | None:
        """The same if nobody waits for it: None also if the experts that could go are worth more, or `awaited`."""
        if (slot := self.take_empty(expert)) is not None:
            return slot
        return self._load_into(self._worth_less(expert, awaited), expert, urgent=False)

    def _awaited_last(self, expert: int, awaited: Set[int]) -> Iterator[int]:
        last: list[int] = []
        for slot in self._victims(expert):
            if self._expert_in_slot[slot] in awaited:
                last.append(slot)
            else:
                yield slot
        yield from last

    def _worth_less(self, expert: int, awaited: Set[int]) -> Iterator[int]:
        for slot in self._victims(expert):
            resident = int(self._expert_in_slot[slot])
            if resident in awaited:
                continue
            if not self._eviction.yields(resident):
                return
            yield slot

    def _load_into(self, slots: Iterable[int], expert: int, *, urgent: bool) -> int | None:
        """The first of `slots` that can be had."""
        slot = self._arena.load_first(slots, expert, urgent, self._process)
        if slot < 0:
            return None
        if self._expert_in_slot[slot] >= 0:
            self._expert_in_slot[slot] = -1
        else:
            self._empty[self._class_of_expert[expert]].pop()
        return slot

    def fill(self, slot: int, expert: int) -> None:
        """It was published there."""
        self._expert_in_slot[slot] = expert

    # ---- to free

    def free(self, slot: int) -> None:
        """Of an EVICTING slot, or of a LOADING one that will not be filled."""
        self._arena.slot_release(slot)
        self._empty[self._class_of_slot[slot]].append(slot)

    def page_out(self, expert: int) -> None:
        """Frees its slot, unless it is pinned, or not there."""
        slot = self._arena.find(expert)
        if slot >= 0 and self._arena.evict_begin(slot):
            self._expert_in_slot[slot] = -1
            self.free(slot)
            self._arena.count(self._process, Counter.PAGE_OUTS, 1)

    def _victims(self, expert: int) -> Iterator[int]:
        """Slots whose experts may go for `expert`, in that order. Not those of experts that the user has pinned: trying
        to evict them would hide them for a moment."""
        may_go = self._slots_of_class[self._class_of_expert[expert]]
        if pinned := self._arena.user_pins():
            may_go = may_go & ~np.isin(self._expert_in_slot, pinned)
        return self._eviction.order(self._expert_in_slot, expert, may_go)
