"""The pager's read lanes: threads that read experts from disk and hash what they read, urgent loads strictly before a
prefetch.

The threads are C (reading/core/lanes.h): they never need the interpreter's lock. In the arena they fill LOADING slots,
publish and count those that are as they should be, and wake who waits (reading/core/publish.h). Everything else is for
the pager's main thread, which begins loads and takes finished ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hotset.runtime.expert_slots import SLOT_ALIGNMENT
from hotset.shm.layout import PrefetchSource
from hotset.shm.segment import Segment
from hotset.workers.expert_store import ExpertReadError, ExpertStore
from hotset.workers.reading import _core

ATTEMPTS = 2  # a passing error of the disk is not a lost request


class Load:
    """One expert on its way into a slot. The fields after `began` are known when it is finished.

    Attributes:
        urgent: somebody waits for it; a prefetch that is overtaken by a request becomes urgent.
        warm_start: nobody had asked for it when it was begun.
        source: of a prefetch; it stays when somebody comes to wait for it.
        began: when it was begun, or became urgent; monotonic nanoseconds.
        published: readers may have it.
        cancelled: a prefetch that was given up, its slot half-filled.
        error: why the expert cannot be had.
    """

    __slots__ = (
        "attempts_left",
        "began",
        "cancelled",
        "error",
        "expert",
        "finished",
        "published",
        "slot",
        "source",
        "urgent",
        "warm_start",
    )

    def __init__(
        self,
        expert: int,
        slot: int,
        *,
        urgent: bool,
        warm_start: bool = False,
        source: PrefetchSource = PrefetchSource.NONE,
    ) -> None:
        self.expert = expert
        self.slot = slot
        self.urgent = urgent
        self.warm_start = warm_start
        self.source = source
        self.began = time.monotonic_ns()
        self.published = False
        self.cancelled = False
        self.error: ExpertReadError | None = None
        self.finished = False
        self.attempts_left = ATTEMPTS


class ReadLanes:
    """`count` threads that share the chunks of all loads; an expert is loaded once at a time.

    Args:
        store: where the experts are.
        slots: the bytes of the slots, by their numbers.
        count: of the threads.
        segment: the arena in which loads are published, and counted in the row of `process`; None if `slots` are not
            those of an arena.

    Attributes:
        fd: readable while there are finished loads to be told of.
    """

    def __init__(
        self,
        store: ExpertStore,
        slots: Sequence[npt.NDArray[np.uint8]],
        count: int,
        segment: Segment | None = None,
        process: int = 0,
    ) -> None:
        self.count = count
        self._store = store
        memory = None if segment is None else segment.memory
        self._lanes = _core.Lanes(slots, count, SLOT_ALIGNMENT if store.direct else 0, memory, process)
        self._known: set[int] = set()  # experts of which the lanes know where they lie
        self._loads: dict[int, Load] = {}
        self._unopened: list[Load] = []  # whose files cannot be opened
        self._tells_of_all = False
        self.fd = self._lanes.fd

    def begin(self, load: Load) -> None:
        store, expert = self._store, load.expert
        if expert not in self._known:
            try:
                pieces, transposed = store.pieces(expert)
            except ExpertReadError as problem:
                if not self._again(load, problem):
                    self._unopened.append(load)
                    os.eventfd_write(self.fd, 1)
                return
            self._lanes.know(expert, pieces, transposed, store.weight_format(expert))
            self._known.add(expert)
        self._loads[expert] = load
        self._lanes.begin(
            expert, load.slot, load.urgent, load.began, store.checksum(expert), load.source, load.warm_start
        )

    def promote(self, load: Load) -> bool:
        """Somebody waits for what was a prefetch; False if that was given up already."""
        if load.urgent or load.finished:
            return not load.cancelled
        if not self._lanes.promote(load.expert):
            return False
        load.urgent = True
        load.began = time.monotonic_ns()
        return True

    def cancel(self, load: Load) -> None:
        """Gives a prefetch up; it is finished as soon as no lane writes to its slot."""
        self._lanes.cancel(load.expert)

    def tell_of_all(self, all_of_them: bool) -> None:
        """Whether `fd` tells of every finished load. Else it leaves out those that were published while there are more
        urgent ones under way: it is soon enough to take them when something else is to be done."""
        if all_of_them != self._tells_of_all:
            self._tells_of_all = all_of_them
            self._lanes.tell_of_all(all_of_them)

    def take_finished(self) -> list[Load]:
        finished = [load for row in self._lanes.take_finished() if (load := self._end(*row)) is not None]
        if self._unopened:
            finished += self._unopened
            self._unopened = []
        return finished

    def close(self) -> None:
        """Returns when no lane writes to any slot any more; loads that were not finished are dropped."""
        self._lanes.close()

    def _end(
        self, expert: int, published: bool, checksum: int, cancelled: bool, error: int, error_fd: int, offset: int
    ) -> Load | None:
        """All chunks were read, or one cannot be, or it was given up. None if it is read over."""
        load = self._loads.pop(expert)
        if published:
            load.published = load.finished = True
            if self._store.checksum(expert) is None:
                self._store.verify(expert, checksum)  # this read defines it
            return load
        load.cancelled = cancelled
        try:
            if not cancelled:
                self._verify(load, checksum, error, error_fd, offset)
        except ExpertReadError as problem:
            if self._again(load, problem):
                return None
        load.finished = True
        return load

    def _again(self, load: Load, problem: ExpertReadError) -> bool:
        """Whether it is begun once more, looked up anew; otherwise it is finished."""
        self._known.discard(load.expert)
        load.attempts_left -= 1
        if load.attempts_left > 0:
            self.begin(load)
            return True
        load.error = problem
        load.finished = True
        return False

    def _verify(self, load: Load, checksum: int, error: int, error_fd: int, offset: int) -> None:
        if error:
            problem = "the file ends there" if error == _core.END_OF_FILE else os.strerror(error)
            raise self._store.error(load.expert, error_fd, offset, problem)
        self._store.verify(load.expert, checksum)
