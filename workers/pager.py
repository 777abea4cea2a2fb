"""The pager process: brings requested experts into slots. Its main thread is the only writer of slot words, masks and
directory, but for slots that are LOADING: the read lane that ends a load publishes it.

Requests come as messages, urgent before prefetch; what the queue could not hold is found by rescanning the request
bits. See shm/core/residency.h for the protocol, whose pager side this is.
"""

from __future__ import annotations

import gc
import select
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from hotset.runtime.channel import Channel
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.messages.pager import ExpertFailed, PagerReady, StartPager, ToPager, WarmStartProblem
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.supervision import run_child
from hotset.shm import _core
from hotset.shm.counters import Counter
from hotset.shm.paging_queue import PagingDirection, PagingPriority, PagingQueue
from hotset.shm.segment import Segment
from hotset.workers.eviction.policy import Eviction
from hotset.workers.expert_store import ExpertStore
from hotset.workers.kept import Kept
from hotset.workers.loads import Loads
from hotset.workers.prefetch.requests import PrefetchRequests
from hotset.workers.read_lanes import ReadLanes
from hotset.workers.read_mode import choose_read_mode
from hotset.workers.slots import Slots
from hotset.workers.warm_start import WarmStart

RESCAN_SECONDS = 0.1
LOADS_PER_LANE = 2  # begun at once, so that a lane finds the next one without waiting for the main thread
RETRY_SECONDS = 0.001  # for requests that found every slot pinned: pins last about a layer step
PREFETCHES_AT_ONCE = 2  # one is read; the next begins without waiting for this process


class Pager:
    """Begins loads as long as read lanes are free, urgent ones first, and takes note of what becomes of them.

    An expert that was requested is in `_urgent` or `_prefetches` until its load begins, then in `_loads`.
    """

    def __init__(self, channel: Channel[ToPager], start: StartPager) -> None:
        self._channel = channel
        self._process = start.process
        self._segment = Segment.attach(start.instance, start.geometry)
        self._arena = self._segment.arena
        self._queue = PagingQueue.attach(start.instance)
        geometry = start.geometry
        self._num_experts = geometry.num_experts
        model = ModelConfig.load(start.model)
        checkpoint = Checkpoint.open(start.model, model)
        self._read_mode = choose_read_mode(start.read_mode, checkpoint, start.read_lanes)
        self._store = ExpertStore(checkpoint, direct=self._read_mode.direct)
        keeps, model_path = start.warm_start, Path(start.model)
        self._warm_start = WarmStart(model_path, self._segment, start.process, enabled=keeps)
        self._eviction = Eviction(
            start.eviction,
            self._segment,
            start.process,
            affinity=self._warm_start.affinity(),
            model=model_path if keeps else None,
        )
        if self._eviction.learned.refused:
            self._count(Counter.LEARNED_REFUSED)
        self._urgent: dict[int, None] = {}  # in the order of arrival
        self._prefetches = PrefetchRequests(self._arena, geometry.num_experts, start.readers)
        self._next_rescan = 0.0
        self._arena.recover()
        class_of_expert = {
            layer * geometry.num_experts + expert: geometry.class_for(checkpoint.expert(layer, expert).nbytes)
            for layer, expert in checkpoint.expert_ids
        }
        self._slots = Slots(self._arena, start.process, geometry, class_of_expert, self._eviction)
        self._lanes = ReadLanes(self._store, self._segment.slots(), start.read_lanes, self._segment, start.process)
        self._loads = Loads(
            self._arena,
            start.process,
            geometry.num_experts,
            self._lanes,
            self._slots,
            on_failure=lambda error: channel.send(ExpertFailed(error.layer, error.expert, str(error))),
            on_give_up=self._warm_start.put_back,
        )
        self._kept = Kept(
            self._warm_start,
            self._eviction.learned,
            resident=self._slots.resident,
            tell=lambda problems: channel.send(WarmStartProblem(problems)),
        )

    # ---- requests

    def _receive_messages(self) -> None:
        """Takes the messages that wait. A message is a hint: the request bit decides."""
        for _ in range(self._queue.waiting):
            if (message := self._queue.receive()) is None:
                return
            experts = [message.layer * self._num_experts + expert for expert in message.experts]
            if message.direction is PagingDirection.OUT:
                self._warm_start.drop(experts)
                for expert in experts:
                    if not self._loads.page_out(expert):
                        self._slots.page_out(expert)
            elif message.priority is PagingPriority.URGENT:
                self._note_urgent(experts)
            else:
                self._prefetches.note(experts, message.source)

    def _rescan(self) -> None:
        """Repairs from the bits what the queue did not carry."""
        for expert in self._prefetches.take_stale():
            if self._arena.requested(expert, False):
                self._arena.withdraw_prefetch(expert)
                self._count(Counter.PREFETCH_DROPPED)
        self._note_urgent(self._arena.urgent_requests())
        self._prefetches.repair(self._arena.prefetch_requests())
        self._next_rescan = time.monotonic() + RESCAN_SECONDS

    def _note_urgent(self, experts: Iterable[int]) -> None:
        for expert in experts:
            self._urgent.setdefault(expert)

    def _serve_urgent(self) -> None:
        """Begins urgent loads until the lanes have enough to do. One that finds no slot of its class does not hold up
        the others: their waiters may pin what it waits for."""
        if not self._urgent:
            return
        self._answer_urgent()
        full_classes: set[int] = set()
        awaited = self._prefetches.awaited()
        for expert in list(self._urgent):
            if expert in self._loads:
                continue  # it was given up a moment ago, and begins again once its slot is free
            if len(self._loads) >= LOADS_PER_LANE * self._lanes.count:
                self._loads.cancel_prefetches()
                return
            slot_class = self._slots.class_of(expert)
            if slot_class in full_classes:
                continue
            if (slot := self._slots.take(expert, awaited)) is not None:
                del self._urgent[expert]
                self._loads.begin(expert, slot, urgent=True)
            else:
                full_classes.add(slot_class)
                self._loads.cancel_prefetches()
                if len(self._loads) < self._lanes.count:  # else the next load that ends is soon enough
                    self._next_rescan = min(self._next_rescan, time.monotonic() + RETRY_SECONDS)

    def _answer_urgent(self) -> None:
        """Those that need no load of their own, or not any more: an earlier message, or a rescan, may have served them.
        All of them before a prefetch is given up for any: it may be what another one waits for."""
        unanswered = self._arena.unanswered(self._urgent)
        self._urgent = {expert: None for expert in unanswered if not self._loads.overtake(expert)}

    def _is_settled(self, expert: int) -> bool:
        """Whether there is nothing to load: then the request is answered."""
        if self._arena.find(expert) < 0 and not self._arena.failed(expert):
            return False
        self._arena.withdraw_request(expert)
        self._arena.wake(expert // self._num_experts)
        return True

    def _serve_prefetch(self) -> bool:
        """Begins or drops one prefetch if no urgent load is going on and the disk is mostly idle; the latest one first.

        One only, so that an urgent request never waits behind a queue of them; whether there was one.
        """
        most = min(PREFETCHES_AT_ONCE, self._lanes.count)
        if not self._prefetches or self._urgent or len(self._loads) >= most or not self._loads.is_disk_idle():
            return False
        expert, source, epoch = self._prefetches.take()
        if not self._arena.requested(expert, False) or self._is_settled(expert):
            return True
        if epoch is not None and expert not in self._loads:
            slot = self._slots.take_for_prefetch(expert, self._prefetches.awaited())
            if slot is not None:
                self._prefetches.begin(expert, epoch)
                self._loads.begin(expert, slot, urgent=False, source=source)
                return True
        self._arena.withdraw_prefetch(expert)
        self._count(Counter.PREFETCH_DROPPED)
        return True

    # ---- what earlier instances had

    def _serve_warm_start(self) -> None:
        """Begins loads into empty slots while nobody wants anything else."""
        most = min(PREFETCHES_AT_ONCE, self._lanes.count)
        if self._urgent or len(self._loads) >= most or not self._loads.is_disk_idle():
            return
        if not self._slots.any_empty():
            self._warm_start.end()
        while len(self._loads) < most and (expert := self._warm_start.next()) is not None:
            if expert not in self._loads and (slot := self._slots.take_empty(expert)) is not None:
                self._loads.begin(expert, slot, urgent=False, warm_start=True)

    # ---- the loop

    def run(self) -> None:
        """Returns when the coordinator says so; raises `ChannelClosed` when it is gone."""
        channel, queue, lanes = self._channel.fileno(), self._queue.fd, self._lanes.fd
        poll = select.poll()
        for source in (channel, queue, lanes):
            poll.register(source, select.POLLIN)
        mode = self._read_mode
        self._channel.send(PagerReady(self._process, "direct" if mode.direct else "buffered", mode.reason))
        self._kept.tell_problems()
        ready = {channel, queue, lanes}
        while True:
            self._loads.finish()  # what lanes tell of, and what they do not: first, so that all of it is remembered
            if channel in ready and any(isinstance(message, StopWorking) for message in self._channel.receive()):
                self._kept.save_all()
                return
            if queue in ready:
                self._receive_messages()
            if time.monotonic() >= self._next_rescan:
                self._eviction.learn()  # before the rings come round, however rare misses are
                self._rescan()
                self._kept.tell_problems()
            self._serve_urgent()
            self._lanes.tell_of_all(bool(self._urgent))
            self._kept.save_if_due()
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
    if start.parent is not None and not _core.die_with_parent(start.parent):
        return
    pager = Pager(channel, start)
    gc.freeze()  # what a model of 10,000 experts needs to be known of it: looking through it all takes 10 ms and more
    try:
        pager.run()
    finally:
        pager.close()


def main(arguments: list[str]) -> int:
    return run_child(arguments, ToPager, StartPager, serve)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
