"""Read lanes: which chunk is read when, what its checksum is, and how a load ends."""

from __future__ import annotations

import errno
import itertools
import os
import random
import select
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from hotset.shm.layout import PrefetchSource, WeightFormat
from hotset.workers.expert_store import ExpertReadError
from hotset.workers.read_lanes import Load, ReadLanes
from hotset.workers.reading import _core

FILE_NBYTES = 3 << 20
PATIENCE = 10.0  # seconds; only a failing test waits that long
NOT_TURNED = np.empty((0, 4), np.int64)
BYTES = np.random.default_rng(0).integers(0, 256, FILE_NBYTES, np.uint8)

Int64 = npt.NDArray[np.int64]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "weights"
    path.write_bytes(BYTES.tobytes())
    os.sync()  # what is not written yet cannot be dropped from the page cache
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def chunks(fd: int, *nbytes: int) -> Int64:
    """One piece each, from the start of the file."""
    starts = itertools.accumulate(nbytes[:-1], initial=0)
    rows = [(number, fd, start, start, nbytes[number]) for number, start in enumerate(starts)]
    return np.array(rows, np.int64)


def begin(
    lanes: _core.Lanes, load: int, slot: int, pieces: Int64, turned: Int64 = NOT_TURNED, *, urgent: bool = True
) -> None:
    """With nothing known of it."""
    lanes.know(load, pieces, turned, WeightFormat.FLOAT32)
    lanes.begin(load, slot, urgent, 0, None, PrefetchSource.NONE, False)


def checksum_of(slot: npt.NDArray[np.uint8]) -> int:
    return xxhash.xxh3_64_intdigest(slot.tobytes())


def wait_for_one(lanes: ReadLanes) -> Load:
    while True:
        assert select.select([lanes.fd], [], [], PATIENCE)[0], "nothing was finished"
        if finished := lanes.take_finished():
            (load,) = finished
            return load


# ---- in which order: the test is the lanes


class PlayedLanes:
    def __init__(self, fd: int) -> None:
        self.core = _core.Lanes([np.zeros(3000, np.uint8) for _ in range(3)], 0)
        self._fd = fd

    def begin(self, load: int, *, urgent: bool) -> None:
        """In the slot of the same number, of three chunks."""
        begin(self.core, load, load, chunks(self._fd, 1000, 1000, 1000), urgent=urgent)

    def finished(self) -> list[int]:
        return [row[0] for row in self.core.take_finished()]


@pytest.fixture
def lanes(file: int) -> Iterator[PlayedLanes]:
    lanes = PlayedLanes(file)
    yield lanes
    lanes.core.close()


def test_one_load_is_spread_over_all_lanes(lanes: PlayedLanes) -> None:
    lanes.begin(0, urgent=True)
    assert [lanes.core.take() for _ in range(4)] == [(0, 0), (0, 1), (0, 2), None]
    for chunk in (1, 2, 0):
        assert lanes.core.take_finished() == []
        lanes.core.read(0, chunk)
    assert lanes.core.take_finished() == [(0, False, checksum_of(BYTES[:3000]), False, 0, 0, 0)]


def test_several_loads_are_read_by_a_lane_each(lanes: PlayedLanes) -> None:
    for load in range(3):
        lanes.begin(load, urgent=True)
    assert [lanes.core.take() for _ in range(4)] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    lanes.core.read(1, 0)
    assert lanes.core.take() == (1, 1)


def test_an_urgent_load_goes_before_the_next_chunk_of_a_prefetch(lanes: PlayedLanes) -> None:
    lanes.begin(1, urgent=False)
    assert [lanes.core.take(), lanes.core.take()] == [(1, 0), None]  # one lane only: the others stay free
    lanes.begin(2, urgent=True)
    assert lanes.core.take() == (2, 0)
    lanes.core.read(1, 0)
    assert [lanes.core.take(), lanes.core.take(), lanes.core.take()] == [(2, 1), (2, 2), None]
    for chunk in range(3):
        assert lanes.core.take() is None  # as long as any of the urgent load is under way
        lanes.core.read(2, chunk)
    assert lanes.finished() == [2]
    assert [lanes.core.take(), lanes.core.take()] == [(1, 1), None]
    lanes.core.read(1, 1)
    assert lanes.core.take() == (1, 2)
    lanes.core.read(1, 2)
    assert lanes.finished() == [1]


def test_prefetches_are_read_one_after_the_other(lanes: PlayedLanes) -> None:
    lanes.begin(1, urgent=False)
    lanes.begin(2, urgent=False)
    for chunk in range(3):
        assert [lanes.core.take(), lanes.core.take()] == [(1, chunk), None]
        lanes.core.read(1, chunk)
    assert lanes.core.take() == (2, 0)


def test_an_overtaken_prefetch_becomes_urgent_and_keeps_what_it_has(lanes: PlayedLanes) -> None:
    lanes.begin(1, urgent=False)
    lanes.begin(2, urgent=False)
    assert lanes.core.take() == (1, 0)
    lanes.core.read(1, 0)
    assert lanes.core.promote(1)
    assert [lanes.core.take() for _ in range(3)] == [(1, 1), (1, 2), None]
    lanes.core.cancel(1)  # too late: somebody waits for it
    lanes.core.read(1, 1)
    lanes.core.read(1, 2)
    assert lanes.core.take_finished() == [(1, False, checksum_of(BYTES[:3000]), False, 0, 0, 0)]


def test_a_prefetch_given_up_is_finished_when_no_lane_writes_to_its_slot(lanes: PlayedLanes) -> None:
    lanes.begin(1, urgent=False)
    assert lanes.core.take() == (1, 0)
    lanes.core.cancel(1)
    assert lanes.core.take_finished() == []
    assert not lanes.core.promote(1), "its chunks are forgotten already"
    lanes.core.read(1, 0)
    ((load, _, _, cancelled, *_),) = lanes.core.take_finished()
    assert (load, cancelled) == (1, True)
    assert lanes.core.take() is None


def test_a_prefetch_given_up_between_two_chunks_is_finished_at_once(lanes: PlayedLanes) -> None:
    lanes.begin(1, urgent=False)
    lanes.core.cancel(1)
    assert select.select([lanes.core.fd], [], [], 0)[0]
    assert lanes.finished() == [1]
    assert not select.select([lanes.core.fd], [], [], 0)[0]


# ---- what is read


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
def test_the_checksum_is_that_of_the_library(instruction_set: str) -> None:
    for nbytes in (*range(1, 300), 1023, 1024, 1025, 1087, 1088, 1089, 2048, 2049, 65_536, 100_001, FILE_NBYTES):
        assert _core.xxh3_64(BYTES[:nbytes], instruction_set) == checksum_of(BYTES[:nbytes]), nbytes
    with pytest.raises(ValueError, match="does not go"):
        _core.xxh3_64(BYTES[:0], instruction_set)


def scattered(fd: int, nbytes: int, chance: random.Random) -> Int64:
    """The slot's bytes come from several places of the file, some in one read for several places of the slot."""
    cuts = [0, *sorted(chance.sample(range(1, nbytes), 12)), nbytes]
    pieces = [(begin, end - begin) for begin, end in itertools.pairwise(cuts)]
    chance.shuffle(pieces)
    rows, number, offset = list[tuple[int, ...]](), 0, 0
    for start, length in pieces:
        rows.append((number, fd, offset, start, length))
        offset += length
        if chance.random() < 0.6:
            number, offset = number + 1, offset + chance.randrange(100)
    return np.array(rows, np.int64)


@pytest.mark.parametrize("threads", [1, 4])
def test_slots_and_checksums_are_right_wherever_the_pieces_come_from(file: int, threads: int) -> None:
    chance = random.Random(threads)
    slots = [np.zeros(2 << 20, np.uint8) for _ in range(4)]
    lanes = _core.Lanes(slots, threads)
    for _ in range(30):
        expected: dict[int, npt.NDArray[np.uint8]] = {}
        for slot in range(4):
            rows = scattered(file, chance.choice([300, 5_000, 300_000, 2 << 20]), chance)
            expected[slot] = np.zeros(int(rows[:, 4].sum()), np.uint8)
            for _, _, offset, start, nbytes in rows.tolist():
                expected[slot][start : start + nbytes] = BYTES[offset : offset + nbytes]
            begin(lanes, slot, slot, rows)
        while expected:
            assert select.select([lanes.fd], [], [], PATIENCE)[0]
            for load, _, checksum, _, error, _, _ in lanes.take_finished():
                bytes_then = expected.pop(load)
                assert error == 0
                assert np.array_equal(slots[load][: len(bytes_then)], bytes_then)
                assert checksum == checksum_of(bytes_then)
    lanes.close()


def test_matrices_are_turned_as_the_slot_is_to_have_them(file: int) -> None:
    slot = np.zeros(2 << 20, np.uint8)
    lanes = _core.Lanes([slot], 2)
    rows, columns, before = 300, 77, 1000
    nbytes = 2 * rows * columns
    turned = np.array([(before, rows, columns, 2), (before + nbytes, 7, 5, 4)], np.int64)
    begin(lanes, 0, 0, chunks(file, before + nbytes + 140 + 50), turned)
    assert select.select([lanes.fd], [], [], PATIENCE)[0]
    ((_, _, checksum, *_),) = lanes.take_finished()
    lanes.close()
    expected = BYTES[: before + nbytes + 140 + 50].copy()
    first, second = expected[before : before + nbytes], expected[before + nbytes : before + nbytes + 140]
    first[:] = first.view(np.uint16).reshape(rows, columns).T.copy().view(np.uint8).ravel()
    second[:] = second.view(np.float32).reshape(7, 5).T.copy().view(np.uint8).ravel()
    assert np.array_equal(slot[: len(expected)], expected)
    assert checksum == checksum_of(expected)


@pytest.mark.parametrize(
    "rows, problem",
    [
        ([(0, 0, 0, 10)], "gap"),  # nothing from 0 to 10
        ([(0, 0, 20, 0), (1, 40, 20, 30)], "gap"),
        ([(0, 0, 20, 0), (1, 40, 20, 10)], "overlap"),
        ([(0, 0, 3001, 0)], "outside"),
        ([(0, 0, 20, 0), (2, 40, 20, 20)], "in order"),
        ([(0, 0, 20, 0), (0, 40, 20, 20)], "follow one another"),
        ([(0, -1, 20, 0)], "out of range"),
        ([], "none"),
    ],
)
def test_pieces_that_do_not_make_an_expert_are_refused(
    lanes: PlayedLanes, file: int, rows: list[tuple[int, int, int, int]], problem: str
) -> None:
    """(chunk, offset, bytes, start)."""
    pieces = np.array([(chunk, file, offset, start, nbytes or 5) for chunk, offset, nbytes, start in rows], np.int64)
    with pytest.raises(ValueError, match=problem):
        begin(lanes.core, 0, 0, pieces.reshape(-1, 5))
    with pytest.raises(ValueError, match="outside"):
        begin(lanes.core, 0, 0, chunks(file, 1000), np.array([(500, 50, 6, 2)], np.int64))
    assert lanes.core.take() is None


# ---- how it ends


class Store:
    """Every expert is the first 2,000 bytes of the file; as often as `bad` says its pieces lie elsewhere."""

    direct = False

    def __init__(self, file: int) -> None:
        self._file = file
        self.bad: list[tuple[int, int]] = []  # file, offset
        self.expected = checksum_of(BYTES[:2000])

    def checksum(self, expert: int) -> int | None:
        return None

    def weight_format(self, expert: int) -> WeightFormat:
        return WeightFormat.FLOAT16

    def pieces(self, expert: int) -> tuple[Int64, Int64]:
        rows = chunks(self._file, 1000, 1000)
        if self.bad:
            fd, offset = self.bad.pop(0)
            if fd < 0:
                raise ExpertReadError("weights", 0, expert, offset, "it is gone")
            rows[1, 1:3] = fd, offset
        return rows, NOT_TURNED

    def verify(self, expert: int, checksum: int) -> None:
        if checksum != self.expected:
            raise ExpertReadError("weights", 0, expert, 0, "its checksum is wrong")

    def error(self, expert: int, fd: int, offset: int, problem: str) -> ExpertReadError:
        return ExpertReadError("weights", 0, expert, offset, f"{problem} ({fd})")


@pytest.fixture
def store(file: int) -> Store:
    return Store(file)


@pytest.fixture
def read_lanes(store: Store) -> Iterator[ReadLanes]:
    lanes = ReadLanes(store, [np.zeros(2000, np.uint8)], 2)  # type: ignore[arg-type]
    yield lanes
    lanes.close()


def test_a_passing_error_is_tried_once_more(store: Store, read_lanes: ReadLanes, file: int, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for expert, (fd, offset) in enumerate([(folder, 0), (file, FILE_NBYTES - 10), (file, 0), (-1, 0)]):
        store.bad = [(fd, offset)]
        read_lanes.begin(Load(expert, 0, urgent=True))
        load = wait_for_one(read_lanes)
        assert store.bad == []
        assert (load.expert, load.error, load.cancelled) == (expert, None, False)
    os.close(folder)


def test_a_lasting_error_is_reported(store: Store, read_lanes: ReadLanes, file: int, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for expert, (fd, offset, problem) in enumerate(
        [
            (folder, 40, f"at byte 40: {os.strerror(errno.EISDIR)} .{folder}."),
            (file, FILE_NBYTES - 10, f"at byte {FILE_NBYTES}: the file ends there .{file}."),
            (file, 0, "its checksum is wrong"),
            (-1, 7, "at byte 7: it is gone"),
        ]
    ):
        store.bad = [(fd, offset)] * 2
        read_lanes.begin(Load(expert, 0, urgent=True))
        load = wait_for_one(read_lanes)
        assert store.bad == []
        with pytest.raises(ExpertReadError, match=problem):
            raise load.error or AssertionError("it is no error")
    os.close(folder)


def test_an_overtaken_prefetch_is_timed_from_then_on(store: Store, read_lanes: ReadLanes) -> None:
    load = Load(3, 0, urgent=False)
    read_lanes.begin(load)
    began = load.began
    assert read_lanes.promote(load)
    assert load.urgent and load.began > began
    assert wait_for_one(read_lanes) is load
    assert read_lanes.promote(load), "it has been read"
