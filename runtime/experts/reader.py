"""What the threads of one process do to the arena of an expert cache: pin, wait, unpin, and look."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.expert_pins import ExpertPins, ExpertUnavailable, Int32
from hotset.runtime.experts.errors import NotEnoughPins
from hotset.runtime.experts.membership import Membership
from hotset.runtime.experts.weights import ExpertWeights, SlotWeights
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RouterConfig
from hotset.shm.layout import ArenaState, PrefetchSource, Section
from hotset.shm.paging_queue import PagingQueue
from hotset.shm.segment import Segment


class Demand(NamedTuple):
    """What a step of a layer wants: experts [rows, n], and whose tokens the rows are; None: a set of no stream."""

    experts: Int32
    streams: Int32 | None


class Begun(NamedTuple):
    """Experts that are pinned: each with its pin, and (expert, slot) of those that can be used already."""

    pins: dict[int, int]
    found: list[tuple[int, int]]


class ExpertReader:
    """Invariant: a pin is in `_free`, or an open block's. The arena is mapped, and the row this process's, as long as a
    block is open, whoever closes the cache meanwhile.

    Args:
        on_closed: is called when the cache is closed and the last block has ended.
    """

    def __init__(
        self, segment: Segment, membership: Membership, checkpoint: Checkpoint, on_closed: Callable[[], None]
    ) -> None:
        self._lock = threading.RLock()  # taken again where the garbage collector ends a block that was forgotten
        self._segment = segment
        self._arena = segment.arena
        self._membership = membership
        self._checkpoint = checkpoint
        self._on_closed = on_closed
        self._process = membership.joined.process
        self._pid = os.getpid()
        self._geometry = segment.layout.geometry
        self._queue = PagingQueue.attach(membership.name)
        self._pins = {prefill: self._pins_of(segment, prefill=prefill) for prefill in (False, True)}
        self._slots = SlotWeights(segment, checkpoint)
        self._free = list(range(self._geometry.pins_per_process))
        self._blocks = 0
        self._closed = False
        self._affinity = ExpertAffinity(
            AffinityConfig(self._geometry.num_experts), segment=segment, process=self._process
        ).core
        self._counts_use = True  # of what is pinned, for affinity and the heat file: routers on this row do it better

    def begin(self, layer: int, experts: Sequence[int], demand: Demand, *, prefill: bool) -> Begun:
        """A block: pins all, or raises `NotEnoughPins`; asks for those that are missing."""
        with self._lock:
            pins = dict(zip(experts, self._take_pins(len(experts), layer, experts, demand), strict=True))
            found, _ = self._pins[prefill].pin(layer, pins)
            return Begun(pins, found)

    def in_turn(
        self, layer: int, experts: Sequence[int], demand: Demand, *, prefill: bool
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """A block, from the first to the last, or until nobody asks any more: each expert with its weights, as many of
        them pinned at once as pins are free. Raises `NotEnoughPins` if that is none."""
        with self._lock:
            needed = min(len(experts), len(self._free) or 1)
            pins = self._take_pins(needed, layer, experts, demand)
        try:
            for together in self._pins[prefill].in_turn(layer, experts, pins.copy()):
                for expert, slot in together:
                    yield expert, self.weights(slot, layer, expert)
        except ExpertUnavailable as error:
            raise self._located(error) from None
        finally:
            self.end(pins)

    def _take_pins(self, needed: int, layer: int, experts: Sequence[int], demand: Demand) -> list[int]:
        """Begins a block. With the lock."""
        self._membership.check()
        if needed > len(self._free):
            raise NotEnoughPins(needed, len(self._free), self._geometry.pins_per_process)
        if experts:
            self._pins[False].note_demand(layer, *demand)
            if self._counts_use:
                self._affinity.update(layer, np.array(experts, np.int32))
        self._blocks += 1
        return [self._free.pop() for _ in range(needed)]

    def wait(self, layer: int, experts: Iterable[int]) -> list[tuple[int, int]]:
        """(expert, slot) of at least one of these, which are pinned and were not resident."""
        self._membership.check()
        try:
            return self._pins[False].wait(layer, experts)
        except ExpertUnavailable as error:
            raise self._located(error) from None

    def _located(self, error: ExpertUnavailable) -> ExpertUnavailable:
        part = self._checkpoint.expert(error.layer, error.expert).parts[0]
        return ExpertUnavailable(error.layer, error.expert, f"{part.file} at byte {part.offset}")

    def weights(self, slot: int, layer: int, expert: int) -> ExpertWeights:
        return self._slots.of(slot, layer, expert)

    def end(self, pins: Collection[int]) -> None:
        """Of a block: what it pinned is not read any more. A fork ends its copy of a block, which is another's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._pins[False].unpin(pins)
            self._free += pins
            self._blocks -= 1
            is_last = self._closed and not self._blocks
        if is_last:
            self._let_go()

    def resident(self, layer: int) -> npt.NDArray[np.bool_]:
        with self._lock:
            self._membership.check()
            words = [
                self._arena.load_u64(Section.RESIDENT_MASK, layer, word) for word in range(self._geometry.mask_words)
            ]
        bits = np.unpackbits(np.array(words, "<u8").view(np.uint8), bitorder="little")
        return bits[: self._geometry.num_experts].astype(np.bool_)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        with self._lock:
            self._membership.check()
            self._pins[False].prefetch(layer, experts, PrefetchSource.ENGINE)

    def router(self, config: RouterConfig, selection_bias: npt.NDArray[np.float32] | None) -> MemoryAwareRouter:
        with self._lock:
            self._membership.check()
            router = MemoryAwareRouter(
                config, segment=self._segment, process=self._process, selection_bias=selection_bias
            )
            self._counts_use = False
        return router

    def close(self) -> None:
        """No block begins any more; those that are open end when they end. Called once."""
        with self._lock:
            self._closed = True
            is_last = not self._blocks
        if is_last:
            self._let_go()

    def _pins_of(self, segment: Segment, *, prefill: bool) -> ExpertPins:
        """Threads may count as either at once."""
        pins = ExpertPins(segment, self._queue, self._process, self._check_owner)
        pins.count_as(prefill=prefill)
        return pins

    def _let_go(self) -> None:
        self._membership.leave()
        self._queue.close()
        del self._pins, self._slots  # their views keep the arena mapped
        self._segment.close()
        del self._segment  # with the last view that somebody may still have, it is unmapped
        self._on_closed()

    def _check_owner(self) -> None:
        self._membership.check_owner(closed=self._arena.state != ArenaState.READY)
