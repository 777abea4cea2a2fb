"""The pager's read lanes: threads that fill slots from disk, urgent loads strictly before a prefetch.

Lanes read bytes and compute checksums, both without the interpreter's lock, and touch nothing of the arena but the
bytes of LOADING slots. Everything else is for the pager's main thread, which begins loads and takes finished ones.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hotset.shm.layout import PrefetchSource, WeightFormat
from hotset.workers.expert_store import Chunk, ExpertReadError, ExpertStore
from hotset.workers.running_checksum import RunningChecksum

ATTEMPTS = 2  # a passing error of the disk is not a lost request


class Load:
    """One expert on its way into a slot. The fields after `began` belong to the lanes until the load is finished.

    Attributes:
        urgent: somebody waits for it; a prefetch that is overtaken by a request becomes urgent.
        warm_start: nobody had asked for it when it was begun.
        source: of a prefetch; it stays when somebody comes to wait for it.
        began: when it was begun, or became urgent; monotonic nanoseconds.
        from_disk: the page cache did not have all of it.
        cancelled: a prefetch that was given up, its slot half-filled.
        error: why the expert cannot be had; otherwise `checksum` and `weight_format` are those of its bytes.
    """

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
        self.from_disk = False
        self.checksum = 0
        self.weight_format = WeightFormat.FLOAT32
        self.error: ExpertReadError | None = None
        self.cancelled = False
        self.finished = False
        self.attempts_left = ATTEMPTS
        self.unread: deque[Chunk] = deque()
        self.reading = 0  # chunks that lanes are at
        self.running_checksum: RunningChecksum  # from `ReadLanes.begin` on

    def count_reading(self) -> int:
        return self.reading


class ReadLanes:
    """`count` threads that share the chunks of all loads.

    A single load is spread over all lanes, several loads over a lane each. A prefetch is read by one lane, one chunk
    after the other, and only while no urgent load is under way: what an urgent load may find before it is at most one
    chunk.

    Attributes:
        fd: readable while there are finished loads.
    """

    def __init__(self, store: ExpertStore, slots: Sequence[npt.NDArray[np.uint8]], count: int) -> None:
        self.count = count
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._store = store
        self._slots = slots
        self._changed = threading.Condition()  # guards what follows
        self._urgent: deque[Load] = deque()  # loads with unread chunks
        self._prefetches: deque[Load] = deque()
        self._urgent_under_way = 0  # with chunks unread or being read
        self._prefetch_is_read = False
        self._finished: list[Load] = []
        self._failure: Exception | None = None
        self._closing = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    # ---- the main thread's side

    def begin(self, load: Load) -> None:
        chunks = self._store.chunks(load.expert)
        load.running_checksum = RunningChecksum(self._slots[load.slot])
        with self._changed:
            load.unread.extend(chunks)
            if load.urgent:
                self._urgent_under_way += 1
            (self._urgent if load.urgent else self._prefetches).append(load)
            self._changed.notify(len(load.unread) if load.urgent else 1)

    def promote(self, load: Load) -> bool:
        """Somebody waits for what was a prefetch; False if that was given up already."""
        with self._changed:
            if load.cancelled:
                return False
            if load.urgent or load.finished:
                return True
            load.urgent = True
            load.began = time.monotonic_ns()
            self._urgent_under_way += 1
            if load.unread:
                self._prefetches.remove(load)
                self._urgent.append(load)
                self._changed.notify(len(load.unread))
            return True

    def cancel(self, load: Load) -> None:
        """Gives a prefetch up; it is finished as soon as no lane writes to its slot."""
        with self._changed:
            if load.urgent or load.finished or load.cancelled:
                return
            load.cancelled = True
            self._forget_unread(load)
            if load.reading:
                return
            self._finish(load)
        os.eventfd_write(self.fd, 1)

    def take_finished(self) -> list[Load]:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)  # before looking: what is finished after that makes it readable again
        with self._changed:
            if self._failure is not None:
                raise self._failure
            finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """Returns when no lane writes to any slot any more; loads that were not finished are dropped."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        os.close(self.fd)

    # ---- the lanes

    def _run(self) -> None:
        try:
            while (work := self._next_chunk()) is not None:
                load, chunk, of_prefetch = work
                error = None
                try:
                    if self._store.read(chunk, self._slots[load.slot]):
                        load.from_disk = True
                    load.running_checksum.add(chunk.pieces)
                except ExpertReadError as problem:
                    error = problem
                if self._was_last(load, of_prefetch, error):
                    self._complete(load)
        except Exception as problem:  # a mistake in this program: the main thread has to know of it
            with self._changed:
                self._failure = problem
            os.eventfd_write(self.fd, 1)

    def _next_chunk(self) -> tuple[Load, Chunk, bool] | None:
        """Waits for work, and says whether it is a prefetch's; None when the lanes close."""
        with self._changed:
            while not self._closing:
                of_prefetch = not self._urgent
                if of_prefetch and (not self._prefetches or self._urgent_under_way or self._prefetch_is_read):
                    self._changed.wait()
                    continue
                loads = self._prefetches if of_prefetch else self._urgent
                # A load for each lane while there are enough of them: then its bytes stay in one core's cache.
                load = min(loads, key=Load.count_reading)
                chunk = load.unread.popleft()
                if not load.unread:
                    loads.remove(load)
                load.reading += 1
                self._prefetch_is_read |= of_prefetch
                return load, chunk, of_prefetch
        return None

    def _was_last(self, load: Load, of_prefetch: bool, error: ExpertReadError | None) -> bool:
        """Whether no chunk is left and no other lane is at one. The load then still counts as being read."""
        with self._changed:
            if of_prefetch:
                self._prefetch_is_read = False
            if error is not None:
                load.error = error
                self._forget_unread(load)
            if load.unread or load.reading > 1:
                load.reading -= 1
                return False
            return True

    def _complete(self, load: Load) -> None:
        """All chunks were read, or one cannot be: verifies, begins again, or gives up."""
        if load.error is None and not load.cancelled:
            try:
                load.checksum, load.weight_format = self._store.complete(
                    load.expert, self._slots[load.slot], load.running_checksum.digest()
                )
            except ExpertReadError as problem:
                load.error = problem
        with self._changed:
            load.reading = 0
            load.attempts_left -= 1
            again = load.error is not None and not load.cancelled and load.attempts_left > 0
            if again:
                load.error = None
                load.running_checksum = RunningChecksum(self._slots[load.slot])
                load.unread.extend(self._store.chunks(load.expert))
                (self._urgent if load.urgent else self._prefetches).appendleft(load)
                self._changed.notify_all()
            else:
                self._finish(load)
        if not again:
            os.eventfd_write(self.fd, 1)

    def _forget_unread(self, load: Load) -> None:
        if load.unread:
            load.unread.clear()
            (self._urgent if load.urgent else self._prefetches).remove(load)

    def _finish(self, load: Load) -> None:
        """The main thread is told without the lock: it would wake only to wait for it."""
        load.finished = True
        self._urgent_under_way -= load.urgent
        self._finished.append(load)
