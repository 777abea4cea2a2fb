"""The pager process: brings requested experts into slots. Its main thread is the only writer of slot words, masks and
directory; its read lanes fill slots.

Requests come as messages, urgent before prefetch; what the queue could not hold is found by rescanning the request
bits. See shm/core/residency.h for the protocol, whose pager side this is.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hotset.runtime.channel import Channel
from hotset.runtime.messages import (
    ExpertFailed,
    PagerReady,
    StartPager,
    StopWorking,
    ToPager,
    WarmStartProblem,
)
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.supervision import run_child
from hotset.shm.counters import Counter, Histogram, PrefetchCount, prefetch_counter
from hotset.shm.layout import PrefetchSource, SlotState
from hotset.shm.paging_queue import PagingDirection, PagingPriority, PagingQueue
from hotset.shm.segment import Segment
from hotset.workers.eviction.policy import Eviction
from hotset.workers.expert_store import ExpertReadError, ExpertStore
from hotset.workers.idle_disk import IdleDisk
from hotset.workers.prefetch.requests import PrefetchRequests
from hotset.workers.read_lanes import Load, ReadLanes
from hotset.workers.read_mode import choose_read_mode
from hotset.workers.warm_start import WarmStart

RESCAN_SECONDS = 0.1
LEARNED_SAVE_SECONDS = 60.0  # what td eviction learned, of which a kill can lose so much
LOADS_PER_LANE = 2  # begun at once, so that a lane finds the next one without waiting for the main thread
RETRY_SECONDS = 0.001  # for requests that found every slot pinned: pins last about a layer step
PREFETCHES_AT_ONCE = 2  # one is read; the next begins without waiting for this process


class Pager:
    """Begins loads as long as read lanes are free, urgent ones first, and publishes them when they are finished.

    `_expert_in_slot` and `_empty_slots` (of each class) mirror the slot words, of which this process is the only
    writer. An expert that was requested is in `_urgent` or `_prefetches` until its load begins, then in `_loads`.
    """

    def __init__(self, channel: Channel[ToPager], start: StartPager) -> None:
        self._channel = channel
        self._process = start.process
        self._segment = Segment.attach(start.instance, start.plan.geometry)
        self._arena = self._segment.arena
        self._queue = PagingQueue.attach(start.instance)
        geometry = start.plan.geometry
        self._num_experts = geometry.num_experts
        model = ModelConfig.load(start.config.model)
        checkpoint = Checkpoint.open(start.config.model, model)
        self._read_mode = choose_read_mode(start.config.read_mode, checkpoint, start.plan.read_lanes)
        self._store = ExpertStore(checkpoint, direct=self._read_mode.direct)
        keeps, model_path = start.config.warm_start, Path(start.config.model)
        self._warm_start = WarmStart(model_path, self._segment, start.process, enabled=keeps)
        self._eviction = Eviction(
            start.config.eviction,
            self._segment,
            start.process,
            affinity=self._warm_start.affinity(),
            model=model_path if keeps else None,
        )
        if self._eviction.learned.problem is not None:
            self._count(Counter.LEARNED_REFUSED)
        self._next_learned_save = time.monotonic() + LEARNED_SAVE_SECONDS
        self._urgent: dict[int, None] = {}  # in the order of arrival
        self._prefetches = PrefetchRequests(self._arena, geometry.num_experts, start.plan.num_workers)
        self._loads: dict[int, Load] = {}
        self._idle_disk = IdleDisk()
        self._next_rescan = 0.0
        self._arena.recover()
        self._expert_in_slot = np.full(geometry.num_slots, -1, np.int64)
        self._class_of_slot = np.array(geometry.classes_of_slots, np.int64)
        self._class_of_expert = {
            layer * geometry.num_experts + expert: geometry.class_for(checkpoint.expert(layer, expert).nbytes)
            for layer, expert in checkpoint.expert_ids
        }
        self._empty_slots: list[list[int]] = [[] for _ in geometry.slot_classes]
        for slot in range(geometry.num_slots - 1, -1, -1):
            _, expert, state = self._arena.slot(slot)
            if state == SlotState.RESIDENT:
                self._expert_in_slot[slot] = expert
            else:
                self._empty_slots[self._class_of_slot[slot]].append(slot)
        self._lanes = ReadLanes(self._store, self._segment.slots(), start.plan.read_lanes)

    # ---- slots

    def _take_slot(self, expert: int, *, prefetched: bool) -> int | None:
        """An EMPTY or EVICTING slot of its class to load `expert` into. None if all experts in such slots are pinned,
        or if it is a prefetch and they are worth more. What was prefetched for a step that is still to come goes last.
        """
        if (slot := self._take_empty_slot(expert)) is not None:
            return slot
        slots = self._evictable_slots()
        of_its_class = self._class_of_slot[slots] == self._class_of_expert[expert]
        awaited = self._prefetches.awaited()
        last: list[int] = []
        for index in self._eviction.order(self._expert_in_slot[slots], expert, of_its_class):
            slot = int(slots[index])
            resident = int(self._expert_in_slot[slot])
            if resident in awaited:
                last.append(slot)
            elif prefetched and not self._eviction.yields(resident):
                return None
            elif self._evict(slot):
                return slot
        return None if prefetched else next((slot for slot in last if self._evict(slot)), None)

    def _evict(self, slot: int) -> bool:
        if not self._arena.evict_begin(slot):
            self._count(Counter.EVICTIONS_REFUSED)
            return False
        self._expert_in_slot[slot] = -1
        self._count(Counter.EVICTIONS)
        return True

    def _evictable_slots(self) -> npt.NDArray[np.int64]:
        """Those with an expert that the user has not pinned: trying to evict it would hide it for a moment."""
        slots = np.flatnonzero(self._expert_in_slot >= 0)
        if pinned := self._arena.user_pins():
            slots = slots[~np.isin(self._expert_in_slot[slots], pinned)]
        return slots

    def _take_empty_slot(self, expert: int) -> int | None:
        slots = self._empty_slots[self._class_of_expert[expert]]
        return slots.pop() if slots else None

    def _free_slot(self, slot: int) -> None:
        """Of an EVICTING slot, or of a LOADING one that will not be filled."""
        self._arena.slot_release(slot)
        self._empty_slots[self._class_of_slot[slot]].append(slot)

    def _page_out(self, expert: int) -> None:
        slot = self._arena.find(expert)
        if slot >= 0 and self._arena.evict_begin(slot):
            self._expert_in_slot[slot] = -1
            self._free_slot(slot)
            self._count(Counter.PAGE_OUTS)

    # ---- loads

    def _begin(
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
        self._note_disk()
        self._lanes.begin(load)

    def _note_disk(self) -> None:
        """After every change of `_loads`, or of whether one of them is urgent."""
        self._idle_disk.note(busy=any(load.urgent for load in self._loads.values()))

    def _finish_loads(self) -> None:
        for load in self._lanes.take_finished():
            del self._loads[load.expert]
            self._note_disk()
            if load.cancelled:
                self._free_slot(load.slot)
                if load.warm_start:
                    self._warm_start.put_back(load.expert)
                else:
                    self._count(Counter.PREFETCH_DROPPED)
            elif load.error is not None:
                self._give_up(load, load.error)
            else:
                self._publish(load)

    def _publish(self, load: Load) -> None:
        nbytes, prefetched = self._store.nbytes(load.expert), not load.urgent and not load.warm_start
        source = load.source if prefetched else PrefetchSource.NONE
        self._arena.load_publish(load.slot, load.checksum, nbytes, load.weight_format, source)
        self._arena.wake(load.expert // self._num_experts)
        self._expert_in_slot[load.slot] = load.expert
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

    def _give_up(self, load: Load, error: ExpertReadError) -> None:
        """The expert's waiters wake, see the failed mask, and fail their requests."""
        self._arena.set_failed(load.expert)
        self._free_slot(load.slot)
        self._arena.wake(load.expert // self._num_experts)
        self._count(Counter.FAILED_LOADS)
        self._channel.send(ExpertFailed(error.layer, error.expert, str(error)))

    # ---- requests

    def _receive_messages(self) -> None:
        """Takes messages until the queue is empty. A message is a hint: the request bit decides."""
        while (message := self._queue.receive()) is not None:
            experts = [message.layer * self._num_experts + expert for expert in message.experts]
            if message.direction is PagingDirection.OUT:
                self._warm_start.drop(experts)
                for expert in experts:
                    self._page_out(expert)
            elif message.priority is PagingPriority.URGENT:
                self._note_urgent(experts)
            else:
                self._prefetches.note(experts, message.source)

    def _rescan(self) -> None:
        """Repairs from the bits what the queue did not carry."""
        self._note_urgent(self._arena.urgent_requests())
        self._prefetches.repair(self._arena.prefetch_requests())
        self._next_rescan = time.monotonic() + RESCAN_SECONDS

    def _note_urgent(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self._urgent.setdefault(expert)

    def _serve_urgent(self) -> None:
        """Begins urgent loads until the lanes have enough to do. One that finds no slot of its class does not hold up
        the others: their waiters may pin what it waits for."""
        full_classes: set[int] = set()
        for expert in list(self._urgent):
            # An earlier message, or a rescan, may have served it.
            if not self._arena.requested(expert, True) or self._is_settled(expert):
                del self._urgent[expert]
            elif expert in self._loads:
                if not self._overtake(self._loads[expert]):
                    continue  # it was given up a moment ago, and begins again once its slot is free
                del self._urgent[expert]
            elif len(self._loads) >= LOADS_PER_LANE * self._lanes.count:
                self._cancel_prefetches()
                return
            elif self._class_of_expert[expert] in full_classes:
                continue
            elif (slot := self._take_slot(expert, prefetched=False)) is not None:
                del self._urgent[expert]
                self._begin(expert, slot, urgent=True)
            else:
                full_classes.add(self._class_of_expert[expert])
                self._cancel_prefetches()
                if len(self._loads) < self._lanes.count:  # else the next load that ends is soon enough
                    self._next_rescan = min(self._next_rescan, time.monotonic() + RETRY_SECONDS)

    def _is_settled(self, expert: int) -> bool:
        """Whether there is nothing to load: then the request is answered."""
        if self._arena.find(expert) < 0 and not self._arena.failed(expert):
            return False
        self._arena.withdraw_request(expert)
        self._arena.wake(expert // self._num_experts)
        return True

    def _overtake(self, load: Load) -> bool:
        """An urgent request for what is being loaded already. Its bit is cleared only if the load is sure to end."""
        if not self._lanes.promote(load):
            return False
        self._note_disk()
        self._arena.withdraw_request(load.expert)
        return True

    def _cancel_prefetches(self) -> None:
        """They give up their lanes and slots."""
        for load in self._loads.values():
            self._lanes.cancel(load)

    def _serve_prefetch(self) -> bool:
        """Begins or drops one prefetch if no urgent load is going on and the disk is mostly idle; the latest one first.

        One only, so that an urgent request never waits behind a queue of them; whether there was one.
        """
        most = min(PREFETCHES_AT_ONCE, self._lanes.count)
        if not self._prefetches or self._urgent or len(self._loads) >= most or not self._idle_disk.is_idle():
            return False
        expert, source, epoch = self._prefetches.take()
        if not self._arena.requested(expert, False) or self._is_settled(expert):
            return True
        if epoch is not None and expert not in self._loads:
            slot = self._take_slot(expert, prefetched=True)
            if slot is not None:
                self._prefetches.begin(expert, epoch)
                self._begin(expert, slot, urgent=False, source=source)
                return True
        self._arena.withdraw_prefetch(expert)
        self._count(Counter.PREFETCH_DROPPED)
        return True

    # ---- what earlier instances had, and what later ones will

    def _serve_warm_start(self) -> None:
        """Begins one load into an empty slot while nobody wants anything else."""
        if self._urgent or self._loads or not self._idle_disk.is_idle():
            return
        if not any(self._empty_slots):
            self._warm_start.end()
        while (expert := self._warm_start.next()) is not None:
            if (slot := self._take_empty_slot(expert)) is not None:
                self._begin(expert, slot, urgent=False, warm_start=True)
                return

    def _save_heat(self) -> None:
        resident = self._expert_in_slot[self._expert_in_slot >= 0]
        self._warm_start.save(resident[list(self._eviction.order(resident))[::-1]])
        self._report_warm_start()

    def _save_learned(self, *, wait: bool = False) -> None:
        self._eviction.learned.save(wait=wait)
        self._next_learned_save = time.monotonic() + LEARNED_SAVE_SECONDS
        self._report_warm_start()

    def _report_warm_start(self) -> None:
        problems = [problem for source in (self._warm_start, self._eviction.learned) if (problem := source.problem)]
        if problems:
            self._channel.send(WarmStartProblem("; ".join(problems)))
            self._warm_start.problem = self._eviction.learned.problem = None

    # ---- the loop

    def run(self) -> None:
        """Returns when the coordinator says so; raises `ChannelClosed` when it is gone."""
        channel, queue, lanes = self._channel.fileno(), self._queue.fd, self._lanes.fd
        poll = select.poll()
        for source in (channel, queue, lanes):
            poll.register(source, select.POLLIN)
        mode = self._read_mode
        self._channel.send(PagerReady(self._process, "direct" if mode.direct else "buffered", mode.reason))
        self._report_warm_start()
        ready = {channel, queue, lanes}
        while True:
            if channel in ready and any(isinstance(message, StopWorking) for message in self._channel.receive()):
                self._save_heat()
                self._save_learned(wait=True)
                return
            if lanes in ready:
                self._finish_loads()
            if queue in ready:
                self._receive_messages()
            if time.monotonic() >= self._next_rescan:
                self._eviction.learn()  # before the rings come round, however rare misses are
                self._rescan()
            self._serve_urgent()
            if self._warm_start.is_save_due():
                self._save_heat()
            if time.monotonic() >= self._next_learned_save:
                self._save_learned()
            timeout = 0.0
            if not self._serve_prefetch():
                self._serve_warm_start()
                timeout = max(0.0, self._next_rescan - time.monotonic())
            ready = {fd for fd, _ in poll.poll(timeout * 1000)}

    def close(self) -> None:
        """Returns when nothing writes to the arena any more."""
        self._lanes.close()
        self._store.close()

    def _count(self, counter: int, amount: int = 1) -> None:
        self._arena.count(self._process, counter, amount)


def serve(channel: Channel[ToPager], start: StartPager) -> None:
    pager = Pager(channel, start)
    try:
        pager.run()
    finally:
        pager.close()


def main(arguments: list[str]) -> int:
    return run_child(arguments, ToPager, StartPager, serve)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
