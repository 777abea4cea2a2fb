"""Experts on their way into slots: the pager's side of its read lanes, from a load's beginning to its publication."""

from __future__ import annotations

import time
from collections.abc import Callable

from hotset.shm import _core
from hotset.shm.counters import Counter, Histogram, PrefetchCount, prefetch_counter
from hotset.shm.layout import PrefetchSource
from hotset.workers.expert_store import ExpertReadError, ExpertStore
from hotset.workers.idle_disk import IdleDisk
from hotset.workers.read_lanes import Load, ReadLanes
from hotset.workers.slots import Slots


class Loads:
    """Loads by their experts, each of which is LOADING in its slot. Only the pager's main thread uses it.

    Args:
        arena: of the instance.
        process: the pager's row.
        num_experts: per layer.
        store: where the lanes read from.
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
        store: ExpertStore,
        lanes: ReadLanes,
        slots: Slots,
        on_failure: Callable[[ExpertReadError], None],
        on_give_up: Callable[[int], None],
    ) -> None:
        self._arena = arena
        self._process = process
        self._num_experts = num_experts
        self._store = store
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
        (self._arena.load_begin if urgent else self._arena.prefetch_begin)(slot, expert)
        load = self._loads[expert] = Load(expert, slot, urgent=urgent, warm_start=warm_start, source=source)
        self._count_urgent_loads(urgent)
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
        self._count_urgent_loads(load.urgent - was_urgent)
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
        """Publishes what the lanes have finished, and frees the slots of what will not come."""
        for load in self._lanes.take_finished():
            del self._loads[load.expert]
            self._count_urgent_loads(-load.urgent)
            unwanted = load.expert in self._unwanted
            self._unwanted.discard(load.expert)
            if load.cancelled:
                self._slots.free(load.slot)
                if not load.warm_start:
                    self._count(Counter.PREFETCH_DROPPED)
                elif not unwanted:
                    self._on_give_up(load.expert)
            elif load.error is not None:
                self._fail(load, load.error)
            else:
                self._publish(load)
                if unwanted and not load.urgent:
                    self._slots.page_out(load.expert)

    def _publish(self, load: Load) -> None:
        nbytes, prefetched = self._store.nbytes(load.expert), not load.urgent and not load.warm_start
        source = load.source if prefetched else PrefetchSource.NONE
        self._arena.load_publish(load.slot, load.checksum, nbytes, load.weight_format, source)
        self._arena.wake(load.expert // self._num_experts)
        self._slots.fill(load.slot, load.expert)
        if load.urgent:
            self._count(Counter.URGENT_PAGE_INS)
        else:
            self._count(Counter.PREFETCH_PAGE_INS if prefetched else Counter.WARM_PAGE_INS)
        if load.source:
            self._count(prefetch_counter(load.source, PrefetchCount.PAGE_INS))
            if load.urgent:
                self._count(prefetch_counter(load.source, PrefetchCount.LATE_HITS))
        self._count(Counter.BYTES_READ, nbytes)
        self._count(Counter.DISK_PAGE_INS if load.from_disk else Counter.PAGE_CACHE_PAGE_INS)
        if load.urgent:
            took = time.monotonic_ns() - load.began
            self._arena.record_latency(self._process, Histogram.PAGING, took)
            self._arena.record_latency(self._process, Histogram.DISK if load.from_disk else Histogram.PAGE_CACHE, took)

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
