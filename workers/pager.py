"""The pager process: brings requested experts into slots. The only writer of slot words, masks and directory.

Requests come as messages, urgent before prefetch; what the queue could not hold is found by rescanning the request
bits. See shm/core/residency.h for the protocol, whose pager side this is.
"""

from __future__ import annotations

import select
import sys
import time

import numpy as np

from hotset.runtime.channel import Channel, ChannelClosed
from hotset.runtime.errors import HotsetError
from hotset.runtime.messages import (
    ExpertFailed,
    PagerReady,
    ProcessFailed,
    StartPager,
    StopWorking,
    ToPager,
)
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.supervision import enter_child
from hotset.shm.counters import Counter, Histogram
from hotset.shm.layout import Section, SlotState
from hotset.shm.paging_queue import PagingDirection, PagingPriority, PagingQueue
from hotset.shm.segment import Segment, SegmentError
from hotset.workers.eviction.policy import make_eviction
from hotset.workers.expert_store import ExpertReadError, ExpertStore

RESCAN_SECONDS = 0.1
RETRY_SECONDS = 0.001  # for requests that found every slot pinned: pins last about a layer step


class Pager:
    """Serves page-in requests one after the other.

    `_expert_in_slot` and `_empty_slots` mirror the slot words, of which this process is the only writer.
    """

    def __init__(self, channel: Channel[ToPager], start: StartPager) -> None:
        self._channel = channel
        self._process = start.process
        self._segment = Segment.attach(start.instance, start.plan.geometry)
        self._arena = self._segment.arena
        self._queue = PagingQueue.attach(start.instance)
        self._slot_bytes = self._segment.view(Section.EXPERT_SLOTS)
        geometry = start.plan.geometry
        self._num_experts = geometry.num_experts
        model = ModelConfig.load(start.config.model)
        self._store = ExpertStore(Checkpoint.open(start.config.model, model), geometry.num_layers, geometry.num_experts)
        self._eviction = make_eviction(start.config.eviction, self._segment, start.process)
        self._next_rescan = 0.0
        self._arena.recover()
        self._expert_in_slot = np.full(geometry.num_slots, -1, np.int64)
        self._empty_slots: list[int] = []
        for slot in range(geometry.num_slots - 1, -1, -1):
            _, expert, state = self._arena.slot(slot)
            if state == SlotState.RESIDENT:
                self._expert_in_slot[slot] = expert
            else:
                self._empty_slots.append(slot)

    # ---- slots

    def _take_slot(self, expert: int, *, prefetched: bool) -> int | None:
        """An EMPTY or EVICTING slot to load `expert` into. None if every resident expert is pinned, or if it is a
        prefetch and the experts that are there are worth more."""
        if self._empty_slots:
            return self._empty_slots.pop()
        slots = np.flatnonzero(self._expert_in_slot >= 0)
        for index in self._eviction.order(self._expert_in_slot[slots]):
            slot = int(slots[index])
            if prefetched and not self._eviction.prefers(expert, int(self._expert_in_slot[slot])):
                return None
            if self._arena.evict_begin(slot):
                self._expert_in_slot[slot] = -1
                self._count(Counter.EVICTIONS)
                return slot
            self._count(Counter.EVICTIONS_REFUSED)
        return None

    def _load(self, expert: int, *, prefetched: bool) -> bool:
        """Brings an absent expert in; False if no slot can be had now. An urgent request then stays, a prefetch
        is dropped."""
        slot = self._take_slot(expert, prefetched=prefetched)
        if slot is None:
            if prefetched:
                self._arena.withdraw_prefetch(expert)
                self._count(Counter.PREFETCH_DROPPED)
            return False
        began = time.monotonic_ns()
        self._arena.load_begin(slot, expert)
        try:
            checksum, weight_format = self._read(expert, slot)
        except ExpertReadError as error:
            self._give_up(slot, expert, error)
            return True
        self._arena.load_publish(slot, checksum, self._store.nbytes, weight_format, prefetched)
        self._arena.wake(expert // self._num_experts)
        self._expert_in_slot[slot] = expert
        self._count(Counter.PREFETCH_PAGE_INS if prefetched else Counter.URGENT_PAGE_INS)
        self._count(Counter.BYTES_READ, self._store.nbytes)
        self._arena.record_latency(self._process, Histogram.PAGING, time.monotonic_ns() - began)
        return True

    def _read(self, expert: int, slot: int) -> tuple[int, int]:
        memory = self._slot_bytes[slot]
        try:
            return self._store.read(expert, memory)
        except ExpertReadError:
            return self._store.read(expert, memory)  # once more: a passing error of the disk is not a lost request

    def _give_up(self, slot: int, expert: int, error: ExpertReadError) -> None:
        """The expert's waiters wake, see the failed mask, and fail their requests."""
        self._arena.set_failed(expert)
        self._arena.slot_release(slot)
        self._empty_slots.append(slot)
        self._arena.wake(expert // self._num_experts)
        self._count(Counter.FAILED_LOADS)
        layer, within = divmod(expert, self._num_experts)
        self._channel.send(ExpertFailed(layer, within, str(error)))

    # ---- requests

    def _serve(self, expert: int, *, prefetched: bool) -> bool:
        """Answers one request; False if it has to wait for a slot."""
        if self._arena.find(expert) >= 0 or self._arena.failed(expert):
            self._arena.withdraw_request(expert)
            self._arena.wake(expert // self._num_experts)
            return True
        return self._load(expert, prefetched=prefetched)

    def _serve_messages(self) -> None:
        """Takes messages until the queue is empty. A message is a hint: the request bit decides."""
        while (message := self._queue.receive()) is not None:
            first = message.layer * self._num_experts
            if message.direction is PagingDirection.OUT:
                for expert in message.experts:
                    self._page_out(first + expert)
                continue
            urgent = message.priority is PagingPriority.URGENT
            for expert in message.experts:
                if not self._arena.requested(first + expert, urgent):
                    continue  # an earlier message, or a rescan, has served it
                if not self._serve(first + expert, prefetched=not urgent) and urgent:
                    self._next_rescan = time.monotonic() + RETRY_SECONDS

    def _page_out(self, expert: int) -> None:
        slot = self._arena.find(expert)
        if slot >= 0 and self._arena.evict_begin(slot):
            self._arena.slot_release(slot)
            self._expert_in_slot[slot] = -1
            self._empty_slots.append(slot)
            self._count(Counter.PAGE_OUTS)

    def _rescan(self) -> None:
        """Repairs from the bits what the queue did not carry, and tries again what found no slot."""
        waiting = False
        for expert in self._arena.urgent_requests():
            waiting |= not self._serve(expert, prefetched=False)
        self._next_rescan = time.monotonic() + (RETRY_SECONDS if waiting else RESCAN_SECONDS)
        if not waiting:
            for expert in self._arena.prefetch_requests():
                self._serve(expert, prefetched=True)

    # ---- the loop

    def run(self) -> None:
        """Returns when the coordinator says so; raises `ChannelClosed` when it is gone."""
        poll = select.poll()
        poll.register(self._queue.fd, select.POLLIN)
        poll.register(self._channel.fileno(), select.POLLIN)
        self._channel.send(PagerReady(self._process))
        while True:
            for message in self._channel.receive():
                if isinstance(message, StopWorking):
                    return
            self._serve_messages()
            if time.monotonic() >= self._next_rescan:
                self._rescan()
            poll.poll(max(0.0, self._next_rescan - time.monotonic()) * 1000)

    def _count(self, counter: Counter, amount: int = 1) -> None:
        self._arena.count(self._process, counter, amount)


def main(arguments: list[str]) -> int:
    channel: Channel[ToPager] = enter_child(arguments, ToPager)
    try:
        start = channel.wait()
        if not isinstance(start, StartPager):
            return 0
        Pager(channel, start).run()
    except ChannelClosed:
        return 0
    except (HotsetError, SegmentError, OSError) as error:
        channel.send(ProcessFailed(str(error)))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
