"""The reader's side of the residency protocol: how a process gets at experts that may not be in memory.

An expert's id is in the process's pin row from before its slot is looked up until its bytes are no longer needed
(rules 1 to 3 in shm/core/residency.h). What is resident then is used at once; what is missing is requested, and waited
for. Workers use this (workers/expert_access.py), and engines that have only the cache (experts/reader.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hotset.runtime.errors import HotsetError
from hotset.shm.counters import Counter, Histogram, PrefetchCount, prefetch_counter
from hotset.shm.layout import PrefetchSource, Section
from hotset.shm.paging_queue import PagingMessage, PagingPriority, PagingQueue
from hotset.shm.segment import Segment

WAIT_MICROSECONDS = 50_000

Int32 = npt.NDArray[np.int32]


class ExpertUnavailable(HotsetError):
    """The pager has given an expert up: its bytes cannot be loaded. `where` they lie, if that is known."""

    def __init__(self, layer: int, expert: int, where: str = "") -> None:
        at = f": {where}" if where else ""
        super().__init__(f"expert {expert} of layer {layer} cannot be loaded: the checkpoint's bytes are damaged{at}")
        self.layer = layer
        self.expert = expert


class ExpertPins:
    """Pins, requests and waits on behalf of one process; counts hits and misses.

    Args:
        segment: the arena.
        queue: for requests.
        process: whose row of pins and counters.
        check: called while an expert is waited for, 20 times a second; what it raises ends the wait.
    """

    def __init__(
        self, segment: Segment, queue: PagingQueue, process: int, check: Callable[[], None] | None = None
    ) -> None:
        self._arena = segment.arena
        self._slot_info = segment.view(Section.SLOT_INFO)
        self._queue = queue
        self._process = process
        self._check = check
        self._num_experts = segment.layout.geometry.num_experts
        self._pins = segment.layout.geometry.pins_per_process
        self._hit_counter = Counter.DECODE_EXPERT_HITS
        self._miss_counter = Counter.DECODE_EXPERT_MISSES

    def count_as(self, *, prefill: bool) -> None:
        """Under which counters hits and misses fall from now on."""
        self._hit_counter = Counter.PREFILL_EXPERT_HITS if prefill else Counter.DECODE_EXPERT_HITS
        self._miss_counter = Counter.PREFILL_EXPERT_MISSES if prefill else Counter.DECODE_EXPERT_MISSES

    def note_demand(self, layer: int, experts: Int32, streams: Int32 | None = None) -> None:
        """Tells whoever keeps the cache what this step of the layer wants, before it asks for any of it.

        `experts` [rows, n] with the `streams` [rows] whose tokens they are for; without them, sets of no stream.
        """
        self._arena.write_demand(self._process, layer, experts, streams)

    def is_resident(self, layer: int, expert: int) -> bool:
        """A hint, as the expert is not pinned."""
        return self._arena.find(layer * self._num_experts + expert) >= 0

    def pin(self, layer: int, pins: Mapping[int, int]) -> tuple[list[tuple[int, int]], list[int]]:
        """Pins experts, each with its own pin: rules 1 to 3.

        Returns (expert, slot) of those that are resident, and the others, which have been requested: `wait` is next.
        All stay pinned until `unpin`.
        """
        arena, process, first = self._arena, self._process, layer * self._num_experts
        found: list[tuple[int, int]] = []
        missed: list[int] = []
        began = time.monotonic_ns()
        for expert, pin in pins.items():
            slot = arena.want(process, pin, first + expert)
            if slot >= 0:
                found.append((expert, slot))
            else:
                missed.append(expert)
        if found:
            took = time.monotonic_ns() - began
            arena.record_latency(process, Histogram.SLOT, took // (len(found) + len(missed)))
        if missed:  # before the others are computed: the pager reads meanwhile
            arena.count(process, self._miss_counter, len(missed))
            self._request(layer, missed)
        if found:
            self._note_hits(first, found)
        return found, missed

    def wait(self, layer: int, experts: Iterable[int]) -> list[tuple[int, int]]:
        """Sleeps until at least one of these is resident, which are pinned and were not; (expert, slot) of all that
        are. Raises `ExpertUnavailable`."""
        found = self._wait(layer, experts)
        first = layer * self._num_experts
        for expert, slot in found:
            if self._arena.take_prefetched(first + expert):
                self._count_for_source(slot, PrefetchCount.LATE_HITS)
        return found

    def unpin(self, pins: Iterable[int]) -> None:
        """What they held is not read any more."""
        for pin in pins:
            self._arena.unpin(self._process, pin)

    def in_turn(
        self,
        layer: int,
        experts: Sequence[int],
        free_pins: list[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields (expert, slot) of every expert, in lists of those that can be used at once, resident ones first, with
        no more than these pins.

        They are pinned until the next list is asked for, and those that are missing are requested before the first is
        given, as far as there are pins. `meanwhile` is called once, in between.

        Raises `ExpertUnavailable`; pins that are then still set, or when nobody asks any more, are not in `free_pins`.
        """
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

    def prefetch(self, layer: int, experts: Iterable[int], source: PrefetchSource) -> None:
        """Asks for experts that nobody waits for; what does not fit the queue is dropped."""
        first = layer * self._num_experts
        unasked = [expert for expert in experts if self._arena.request_prefetch(first + expert)]
        if not unasked:
            return
        self._arena.count(self._process, Counter.PREFETCH_REQUESTS, len(unasked))
        self._arena.count(self._process, prefetch_counter(source, PrefetchCount.REQUESTS), len(unasked))
        if not self._queue.send(PagingMessage(layer, unasked, priority=PagingPriority.PREFETCH, source=source)):
            self._arena.count(self._process, Counter.PREFETCH_DROPPED, len(unasked))
            for expert in unasked:
                self._arena.withdraw_prefetch(first + expert)

    def _note_hits(self, first: int, found: Sequence[tuple[int, int]]) -> None:
        """Of experts that are pinned, with their slots; `first` is the id of their layer's expert 0."""
        self._arena.count(self._process, self._hit_counter, len(found))
        for expert, slot in found:
            if self._arena.take_prefetched(first + expert):
                self._arena.count(self._process, Counter.PREFETCH_HITS, 1)
                self._count_for_source(slot, PrefetchCount.HITS)

    def _count_for_source(self, slot: int, count: PrefetchCount) -> None:
        """For the source of a prefetch that is used for the first time."""
        source = PrefetchSource(int(self._slot_info[slot, 0]["source"]))
        self._arena.count(self._process, prefetch_counter(source, count), 1)

    def _request(self, layer: int, experts: Sequence[int]) -> None:
        """Sets the urgent bits and sends one message for those that nobody had asked for yet."""
        first = layer * self._num_experts
        unasked = [expert for expert in experts if self._arena.request_urgent(first + expert)]
        if unasked:
            self._queue.send(PagingMessage(layer, unasked))  # if it does not fit, the bits are found by a rescan

    def _wait(self, layer: int, experts: Iterable[int]) -> list[tuple[int, int]]:
        arena, first = self._arena, layer * self._num_experts
        began = asked = time.monotonic_ns()
        while True:
            # Read before the check: an arrival between check and sleep changes it, and the sleep does not begin.
            generation = arena.generation(layer)
            found = [(expert, slot) for expert in experts if (slot := arena.find(first + expert)) >= 0]
            if found:
                arena.count(self._process, Counter.EXPERT_WAIT_NANOSECONDS, time.monotonic_ns() - began)
                return found
            for expert in experts:
                if arena.failed(first + expert):
                    raise ExpertUnavailable(layer, expert)
            if time.monotonic_ns() - asked >= 1000 * WAIT_MICROSECONDS:
                # No request is lost, but for a pager that was killed at the wrong moment.
                if self._check is not None:
                    self._check()
                self._request(layer, list(experts))
                asked = time.monotonic_ns()
            arena.wait(layer, generation, WAIT_MICROSECONDS)
