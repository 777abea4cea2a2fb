"""Read lanes over a store whose reads wait for the test: which chunk is read when, and how a load ends."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from hotset.shm.layout import WeightFormat
from hotset.workers.expert_store import Chunk, ExpertReadError
from hotset.workers.read_lanes import Load, ReadLanes

CHUNKS = 3
PATIENCE = 10.0  # seconds; only a failing test waits that long


class GatedStore:
    """Every read waits until the test lets it through; a chunk is one byte, the number of its expert."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, int]] = []  # (expert, chunk) that lanes are at
        self.errors: dict[int, int] = {}  # reads of an expert that are still to fail
        self._let_through: set[tuple[int, int]] = set()
        self._open = False
        self._changed = threading.Condition()

    def chunks(self, expert: int) -> list[Chunk]:
        return [Chunk(expert, "weights", at, 1, ((at, 1),)) for at in range(CHUNKS)]

    def read(self, chunk: Chunk, slot: npt.NDArray[np.uint8]) -> None:
        key = (chunk.expert_id, chunk.offset)
        with self._changed:
            self.waiting.append(key)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._open or key in self._let_through, PATIENCE)
            self._let_through.discard(key)
            self.waiting.remove(key)
            self._changed.notify_all()
            if self.errors.get(chunk.expert_id, 0):
                self.errors[chunk.expert_id] -= 1
                raise ExpertReadError("weights", 0, chunk.expert_id, chunk.offset, "the disk is tired")
        slot[chunk.offset] = chunk.expert_id

    def complete(self, expert: int, slot: npt.NDArray[np.uint8], checksum: int) -> tuple[int, WeightFormat]:
        assert list(slot[:CHUNKS]) == [expert] * CHUNKS
        assert checksum == xxhash.xxh3_64_intdigest(bytes([expert] * CHUNKS))
        return expert, WeightFormat.FLOAT16

    def wait_for(self, *reads: tuple[int, int]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: sorted(self.waiting) == sorted(reads), PATIENCE), self.waiting

    def let_through(self, *reads: tuple[int, int]) -> None:
        with self._changed:
            self._let_through |= set(reads)
            self._changed.notify_all()

    def open(self) -> None:
        """From now on reads do not wait."""
        with self._changed:
            self._open = True
            self._changed.notify_all()


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


@pytest.fixture
def lanes(store: GatedStore) -> Iterator[ReadLanes]:
    lanes = ReadLanes(store, np.zeros((4, CHUNKS), np.uint8), 2)  # type: ignore[arg-type]
    yield lanes
    store.open()
    lanes.close()


def finished(lanes: ReadLanes) -> Load:
    assert select.select([lanes.fd], [], [], PATIENCE)[0], "nothing was finished"
    (load,) = lanes.take_finished()
    return load


def test_one_load_is_spread_over_all_lanes(store: GatedStore, lanes: ReadLanes) -> None:
    lanes.begin(Load(7, 0, urgent=True))
    store.wait_for((7, 0), (7, 1))
    store.let_through((7, 1))
    store.wait_for((7, 0), (7, 2))
    store.let_through((7, 0), (7, 2))
    load = finished(lanes)
    assert (load.expert, load.checksum, load.error, load.cancelled) == (7, 7, None, False)


def test_an_urgent_load_goes_before_the_next_chunk_of_a_prefetch(store: GatedStore, lanes: ReadLanes) -> None:
    prefetch, urgent = Load(1, 0, urgent=False), Load(2, 1, urgent=True)
    lanes.begin(prefetch)
    store.wait_for((1, 0))  # one lane only: the other stays free
    lanes.begin(urgent)
    store.wait_for((1, 0), (2, 0))
    store.let_through((1, 0))
    store.wait_for((2, 0), (2, 1))
    store.let_through((2, 0), (2, 1))
    store.wait_for((2, 2))  # nothing of the prefetch is read while the urgent load is under way
    store.let_through((2, 2))
    assert finished(lanes) is urgent
    store.wait_for((1, 1))
    store.let_through((1, 1), (1, 2))
    assert finished(lanes) is prefetch
    assert prefetch.error is None and not prefetch.urgent


def test_an_overtaken_prefetch_becomes_urgent_and_keeps_what_it_has(store: GatedStore, lanes: ReadLanes) -> None:
    load = Load(1, 0, urgent=False)
    lanes.begin(load)
    store.wait_for((1, 0))
    assert lanes.promote(load)
    store.wait_for((1, 0), (1, 1))  # now on all lanes
    lanes.cancel(load)  # too late: somebody waits for it
    store.let_through((1, 0), (1, 1), (1, 2))
    assert finished(lanes) is load
    assert load.urgent and not load.cancelled


def test_a_prefetch_given_up_is_finished_when_no_lane_writes_to_its_slot(store: GatedStore, lanes: ReadLanes) -> None:
    load = Load(1, 0, urgent=False)
    lanes.begin(load)
    store.wait_for((1, 0))
    lanes.cancel(load)
    assert lanes.take_finished() == []
    assert not lanes.promote(load), "its chunks are forgotten already"
    store.let_through((1, 0))
    assert finished(lanes) is load
    assert load.cancelled
    store.wait_for()


def test_a_prefetch_given_up_between_two_chunks_is_finished_at_once(store: GatedStore, lanes: ReadLanes) -> None:
    prefetch, urgent = Load(1, 0, urgent=False), Load(2, 1, urgent=True)
    lanes.begin(urgent)
    store.wait_for((2, 0), (2, 1))
    lanes.begin(prefetch)
    lanes.cancel(prefetch)
    assert finished(lanes) is prefetch


def test_a_passing_error_is_tried_once_more(store: GatedStore, lanes: ReadLanes) -> None:
    store.open()
    store.errors[3] = 1
    lanes.begin(Load(3, 0, urgent=True))
    assert finished(lanes).error is None
    assert store.errors[3] == 0


def test_a_lasting_error_is_reported(store: GatedStore, lanes: ReadLanes) -> None:
    store.open()
    store.errors[3] = 2 * CHUNKS
    lanes.begin(Load(3, 0, urgent=True))
    load = finished(lanes)
    assert load.error is not None and "the disk is tired" in str(load.error)


def test_a_mistake_in_a_lane_reaches_the_main_thread(store: GatedStore, lanes: ReadLanes) -> None:
    del store.errors
    store.open()
    lanes.begin(Load(5, 0, urgent=True))
    assert select.select([lanes.fd], [], [], PATIENCE)[0]
    with pytest.raises(AttributeError):
        lanes.take_finished()
