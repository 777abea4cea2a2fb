"""Loads that the read lanes publish themselves: which, what else they write, and when the main thread is told."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from hotset.shm.counters import Counter, Histogram, PrefetchCount, prefetch_counter
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.layout import COUNTERS_PER_PROCESS, HISTOGRAM_BUCKETS, PrefetchSource, Section, SlotState, WeightFormat
from hotset.shm.segment import Segment
from hotset.workers.reading import _core

PAGER = 1
EXPERTS = 4
CHUNK = 4096
NBYTES = 2 * CHUNK
BYTES = np.random.default_rng(0).integers(0, 256, EXPERTS * NBYTES, np.uint8)


def bytes_of(expert: int) -> bytes:
    return BYTES[expert * NBYTES : (expert + 1) * NBYTES].tobytes()


class Played:
    """Two layers of two experts of two chunks each, in the slots of the same numbers; the test is the lane."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(BYTES.tobytes())
        os.sync()  # what is not written yet cannot be dropped from the page cache
        self.file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self.file, 0, 0, os.POSIX_FADV_RANDOM)  # as the store does; else one folio may hold many pages
        self.segment = Segment.private(
            Geometry(num_layers=2, num_experts=2, num_processes=2, slot_classes=(SlotClass(EXPERTS, NBYTES),))
        )
        self.arena = self.segment.arena
        self.core = _core.Lanes(self.segment.slots(), 0, memory=self.segment.memory, process=PAGER)

    def begin(
        self,
        expert: int,
        *,
        urgent: bool = True,
        expected: int | None = None,
        source: PrefetchSource = PrefetchSource.NONE,
        warm_start: bool = False,
    ) -> None:
        (self.arena.load_begin if urgent else self.arena.prefetch_begin)(expert, expert)
        start = expert * NBYTES
        pieces = np.array([(n, self.file, start + n * CHUNK, n * CHUNK, CHUNK) for n in range(2)], np.int64)
        turned = np.empty((0, 4), np.int64)
        now = time.monotonic_ns()
        self.core.know(expert, pieces, turned, WeightFormat.BFLOAT16)
        self.core.begin(expert, expert, urgent, now, expected, source, warm_start)

    def read(self) -> None:
        """All that there is to read."""
        while (run := self.core.take()) is not None:
            self.core.read(*run)

    def read_until_found(self, expert: int) -> None:
        """Until this one is published; of others as much as a lane takes before."""
        while self.arena.find(expert) < 0:
            run = self.core.take()
            assert run is not None
            self.core.read(*run)

    def state(self, expert: int) -> SlotState:
        return SlotState(self.arena.slot(expert)[2])

    def is_told(self) -> bool:
        return bool(select.select([self.core.fd], [], [], 0)[0])

    def count(self, counter: int) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self.arena.counter_totals(totals)
        return int(totals[counter])

    def timed(self, histogram: Histogram) -> int:
        buckets = np.empty(HISTOGRAM_BUCKETS, np.uint64)
        self.arena.histogram_totals(histogram, buckets)
        return int(buckets.sum())


@pytest.fixture
def played(tmp_path: Path) -> Iterator[Played]:
    played = Played(tmp_path / "weights")
    yield played
    played.core.close()
    os.close(played.file)
    played.segment.close()


# ---- what is published


@pytest.mark.parametrize("known", [True, False])
def test_what_is_as_it_should_be_is_there_before_the_main_thread_knows(played: Played, known: bool) -> None:
    checksum = xxhash.xxh3_64_intdigest(bytes_of(2))
    generations = [played.arena.generation(layer) for layer in range(2)]
    played.begin(2, expected=checksum if known else None)
    first = played.core.take()
    assert first is not None
    played.core.read(*first)
    assert played.state(2) == SlotState.LOADING
    assert played.arena.find(2) < 0
    played.read()
    assert played.arena.find(2) == 2
    assert played.segment.slots()[2][:NBYTES].tobytes() == bytes_of(2)
    info = played.segment.view(Section.SLOT_INFO)[2, 0]
    expected = (checksum, NBYTES, WeightFormat.BFLOAT16, PrefetchSource.NONE)
    assert (info["checksum"], info["nbytes"], info["format"], info["source"]) == expected
    assert played.arena.resident_experts() == [2]
    assert not played.arena.take_prefetched(2)
    now = [played.arena.generation(layer) for layer in range(2)]
    assert now == [generations[0], generations[1] + 1], "who waits for its layer, and nobody else, is woken"
    assert played.count(Counter.URGENT_PAGE_INS) == 1
    assert played.count(Counter.BYTES_READ) == NBYTES
    assert played.timed(Histogram.PAGING) == 1
    assert played.core.take_finished() == [(2, True, checksum, False, 0, 0, 0)]


def test_what_has_another_checksum_is_left_to_the_main_thread(played: Played) -> None:
    checksum = xxhash.xxh3_64_intdigest(bytes_of(1))
    played.begin(1, expected=checksum ^ 1)
    played.read()
    assert played.state(1) == SlotState.LOADING
    assert played.count(Counter.URGENT_PAGE_INS) == 0
    assert played.is_told()
    assert played.core.take_finished() == [(1, False, checksum, False, 0, 0, 0)]


def test_what_cannot_be_read_is_left_to_the_main_thread(played: Played) -> None:
    played.begin(3)
    os.truncate(f"/proc/self/fd/{played.file}", EXPERTS * NBYTES - 1)
    played.read()
    assert played.state(3) == SlotState.LOADING
    assert played.is_told()
    ((_, published, _, _, error, _, _),) = played.core.take_finished()
    assert (published, error) == (False, _core.END_OF_FILE)


def test_a_prefetch_that_was_given_up_is_not_published_by_who_still_reads_it(played: Played) -> None:
    played.begin(0, urgent=False)
    first = played.core.take()
    assert first is not None
    played.core.read(*first)
    last = played.core.take()
    assert last is not None
    played.core.cancel(0)
    played.core.read(*last)
    assert played.state(0) == SlotState.LOADING
    ((_, published, _, cancelled, *_),) = played.core.take_finished()
    assert (published, cancelled) == (False, True)


def test_a_prefetch_that_is_there_is_not_given_up(played: Played) -> None:
    played.begin(0, urgent=False)
    played.read()
    played.core.cancel(0)
    assert played.core.promote(0), "who comes to wait for it has it"
    ((_, published, _, cancelled, *_),) = played.core.take_finished()
    assert (published, cancelled) == (True, False)


# ---- as what it is counted


def test_a_prefetch_is_marked_and_counted_for_its_source(played: Played) -> None:
    played.begin(0, urgent=False, source=PrefetchSource.TRANSITIONS)
    played.begin(1, urgent=False, source=PrefetchSource.TRANSITIONS)
    assert played.core.promote(1)
    played.read()
    assert played.arena.take_prefetched(0)
    assert not played.arena.take_prefetched(1), "a hit would be counted that was none"
    assert played.count(Counter.PREFETCH_PAGE_INS) == 1
    assert played.count(Counter.URGENT_PAGE_INS) == 1
    assert played.count(prefetch_counter(PrefetchSource.TRANSITIONS, PrefetchCount.PAGE_INS)) == 2
    assert played.count(prefetch_counter(PrefetchSource.TRANSITIONS, PrefetchCount.LATE_HITS)) == 1
    assert played.timed(Histogram.PAGING) == 1


def test_a_warm_start_is_not_taken_for_a_prefetch(played: Played) -> None:
    played.begin(0, urgent=False, warm_start=True)
    played.read()
    assert not played.arena.take_prefetched(0)
    assert played.count(Counter.WARM_PAGE_INS) == 1
    assert played.count(Counter.PREFETCH_PAGE_INS) == 0


def test_what_the_page_cache_had_is_told_from_what_the_disk_was_read_for(played: Played) -> None:
    os.posix_fadvise(played.file, 0, 0, os.POSIX_FADV_DONTNEED)
    played.begin(0)
    played.read()
    if not played.count(Counter.DISK_PAGE_INS):
        pytest.skip("this file system keeps what it is told to drop")
    played.begin(1)
    os.posix_fadvise(played.file, NBYTES, CHUNK, os.POSIX_FADV_DONTNEED)
    os.pread(played.file, CHUNK, NBYTES + CHUNK)  # half of it
    played.read()
    os.pread(played.file, NBYTES, 2 * NBYTES)
    played.begin(2)
    played.read()
    assert (played.count(Counter.DISK_PAGE_INS), played.count(Counter.PAGE_CACHE_PAGE_INS)) == (2, 1)
    assert (played.timed(Histogram.DISK), played.timed(Histogram.PAGE_CACHE)) == (2, 1)


# ---- when the main thread is told


def test_the_main_thread_is_told_when_the_last_urgent_load_is_there(played: Played) -> None:
    played.begin(0)
    played.begin(1)
    played.read_until_found(0)
    assert not played.is_told(), "it would wake for nothing"
    assert [load for load, *_ in played.core.take_finished()] == [0], "if it is awake it may as well look"
    played.read()
    assert played.is_told()
    assert [load for load, *_ in played.core.take_finished()] == [1]
    assert not played.is_told()


def test_a_main_thread_that_needs_lanes_is_told_of_every_load(played: Played) -> None:
    played.begin(0)
    played.begin(1)
    played.read_until_found(0)
    played.core.tell_of_all(True)
    assert played.is_told(), "it came too late for the first"
    assert [load for load, *_ in played.core.take_finished()] == [0]
    played.begin(2)
    played.read_until_found(1)
    assert played.is_told()


def test_a_finished_prefetch_is_told_of_at_once(played: Played) -> None:
    played.begin(0, urgent=False)
    played.begin(1, urgent=False)
    played.read_until_found(0)
    assert played.is_told()


def test_memory_that_is_no_arena_is_refused(played: Played) -> None:
    with pytest.raises(ValueError, match="does not begin with"):
        _core.Lanes([], 0, memory=bytearray(1 << 16))
    with pytest.raises(IndexError, match="process is 2, expected 0 <= process < 2"):
        _core.Lanes([], 0, memory=played.segment.memory, process=2)
