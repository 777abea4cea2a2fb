"""Experts on their way into slots: what the pager's main thread knows of the loads that its read lanes are at."""

from __future__ import annotations

from collections.abc import Callable

from hotset.shm import _core
from hotset.shm.counters import Counter
from hotset.shm.layout import PrefetchSource
from hotset.workers.expert_store import ExpertReadError
from hotset.workers.idle_disk import IdleDisk
from hotset.workers.read_lanes import Load, ReadLanes
from hotset.workers.slots import Slots


class Loads:
    """Loads by their experts, each LOADING in its slot, or published there by its lane since the last `finish`. Only
    the pager's main thread uses it.

    Args:
        arena: of the instance.
        process: the pager's row, of which the lanes write what is counted of publications.
        num_experts: per layer.
        lanes: that read.
        slots: into which.
        on_failure: is told of an expert that somebody waits for and that cannot be had.
        on_give_up: is told of an expert of the warm start whose load was given up for others.
    """

    def __init__(
        self,
        arena: _core.Arena,
        process: int,
        num_experts: int,
        lanes: ReadLanes,
        slots: Slots,
        on_failure: Callable[[ExpertReadError], None],
        on_give_up: Callable[[int], None],
    ) -> None:
        self._arena = arena
        self._process = process
        self._num_experts = num_experts
        self._lanes = lanes
        self._slots = slots
        self._on_failure = on_failure
        self._on_give_up = on_give_up
        self._loads: dict[int, Load] = {}
        self._urgent_loads = 0  # of them
        self._unwanted: set[int] = set()  # of them: paged out while they are read
        self._idle_disk = IdleDisk()

    def __len__(self) -> int:
        return len(self._loads)

    def __contains__(self, expert: int) -> bool:
        return expert in self._loads

    def is_disk_idle(self) -> bool:
        """Whether no urgent load is under way, and few were lately."""
        return self._idle_disk.is_idle()

    def begin(
        self,
        expert: int,
        slot: int,
        *,
        urgent: bool,
        warm_start: bool = False,
        source: PrefetchSource = PrefetchSource.NONE,
    ) -> None:
        """Into a slot that is LOADING (slots.py)."""
        load = self._loads[expert] = Load(expert, slot, urgent=urgent, warm_start=warm_start, source=source)
        if urgent:
            self._count_urgent_loads(1)
        self._lanes.begin(load)

    def overtake(self, expert: int) -> bool:
        """An urgent request for what may be being loaded already: whether that answers it. Its bit is cleared only if
        the load is sure to end."""
        load = self._loads.get(expert)
        if load is None:
            return False
        was_urgent = load.urgent
        if not self._lanes.promote(load):
            return False
        if not was_urgent and load.urgent:
            self._count_urgent_loads(1)
        self._arena.withdraw_request(expert)
        return True

    def cancel_prefetches(self) -> None:
        """They give up their lanes and slots."""
        for load in self._loads.values():
            self._lanes.cancel(load)

    def page_out(self, expert: int) -> bool:
        """Gives up what is being loaded, unless somebody waits for it; false if it is not."""
        load = self._loads.get(expert)
        if load is None:
            return False
        self._unwanted.add(expert)
        self._lanes.cancel(load)  # if it is too late for that, it goes when it has come
        return True

    def finish(self) -> None:
        """Takes note of what the lanes have published, and frees the slots of what will not come."""
        for load in self._lanes.take_finished():
            del self._loads[load.expert]
            if load.urgent:
                self._count_urgent_loads(-1)
            unwanted = load.expert in self._unwanted
            self._unwanted.discard(load.expert)
            if load.published:
                self._slots.fill(load.slot, load.expert)
                if unwanted and not load.urgent:
                    self._slots.page_out(load.expert)
            elif load.cancelled:
                self._slots.free(load.slot)
                if not load.warm_start:
                    self._count(Counter.PREFETCH_DROPPED)
                elif not unwanted:
                    self._on_give_up(load.expert)
            else:
                assert load.error is not None
                self._fail(load, load.error)

    def _fail(self, load: Load, error: ExpertReadError) -> None:
        """The expert's waiters wake, see the failed mask, and fail their requests. What nobody waits for, a prefetch or
        part of a warm start, is no expert lost: whoever needs it asks for it, and it is tried again."""
        self._slots.free(load.slot)
        self._count(Counter.FAILED_LOADS)
        if load.urgent:
            self._arena.set_failed(load.expert)
            self._arena.wake(load.expert // self._num_experts)
            self._on_failure(error)

    def _count_urgent_loads(self, change: int) -> None:
        self._urgent_loads += change
        self._idle_disk.note(busy=self._urgent_loads > 0)

    def _count(self, counter: int, amount: int = 1) -> None:
        self._arena.count(self._process, counter, amount)
