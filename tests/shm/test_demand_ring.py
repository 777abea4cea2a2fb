"""The rings of demands: what a worker wrote is read back in order, and a reader knows when it came too late."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hotset.shm.demands import HEADER_WORDS, NO_STREAM, DemandReader, demand_of_set
from hotset.shm.geometry import Geometry
from hotset.shm.layout import DEMAND_RING_HEADER, Section
from hotset.shm.segment import Segment

WORDS = 64


@pytest.fixture
def segment() -> Iterator[Segment]:
    geometry = Geometry(num_layers=3, num_experts=70, num_processes=2, demand_words=WORDS)
    segment = Segment.private(geometry)
    yield segment
    segment.close()


def test_a_demand_is_read_as_it_was_written(segment: Segment) -> None:
    reader = DemandReader(segment)
    experts, streams = np.array([[1, 2, 69], [4, 5, 6]], np.int32), np.array([7, 9], np.int32)
    segment.arena.write_demand(1, 2, experts, streams)
    ((records, lost),) = reader.read()
    assert not lost
    assert records[:4].tolist() == [HEADER_WORDS + 8, 2, 2, 3]
    assert records[HEADER_WORDS:].tolist() == [7, 1, 2, 69, 9, 4, 5, 6]
    assert list(reader.read()) == []


def test_a_reader_that_stopped_at_one_ring_finds_the_others_next_time(segment: Segment) -> None:
    reader = DemandReader(segment)
    for process in range(2):
        segment.arena.write_demand(process, process, np.array([[3]], np.int32), None)
    records, _ = next(reader.read())
    assert records[1] == 0
    ((records, _),) = reader.read()
    assert records[1] == 1
    assert list(reader.read()) == []


def test_a_set_belongs_to_no_stream(segment: Segment) -> None:
    reader = DemandReader(segment)
    segment.arena.write_demand(0, 1, np.array([[3, 5]], np.int32), None)
    ((records, _),) = reader.read()
    expected = demand_of_set(1, [3, 5], NO_STREAM)
    expected[4:8] = records[4:8]
    assert records.tolist() == expected.tolist()
    assert records[HEADER_WORDS] == NO_STREAM


def test_stamps_rise(segment: Segment) -> None:
    reader = DemandReader(segment)
    for _ in range(3):
        segment.arena.write_demand(0, 0, np.array([[1]], np.int32), None)
    ((records, _),) = reader.read()
    stamps = records.reshape(3, -1)[:, 4:8].copy().view(np.uint64).ravel().tolist()
    assert stamps == sorted(stamps) and stamps[0] > 0


def test_records_go_round_the_ring(segment: Segment) -> None:
    reader = DemandReader(segment)
    for number in range(50):
        segment.arena.write_demand(0, number % 3, np.array([[number, number + 1]], np.int32), None)
        ((records, lost),) = reader.read()
        assert not lost and records[[1, 9, 10]].tolist() == [number % 3, number, number + 1]


def test_a_reader_that_comes_too_late_goes_on_at_the_newest(segment: Segment) -> None:
    reader = DemandReader(segment)
    for number in range(30):
        segment.arena.write_demand(0, 0, np.array([[number]], np.int32), None)
    ((records, lost),) = reader.read()
    assert lost and not len(records)
    segment.arena.write_demand(0, 0, np.array([[30]], np.int32), None)
    ((records, lost),) = reader.read()
    assert not lost and records[HEADER_WORDS + 1] == 30


def test_words_that_a_dying_writer_was_overwriting_are_not_read(segment: Segment) -> None:
    reader = DemandReader(segment)
    for _ in range(4):
        segment.arena.write_demand(0, 0, np.array([[1, 2, 3]], np.int32), None)
    section = segment.layout.sections[21]
    assert section.section.name == "DEMANDS"
    # As a writer leaves it that was killed within its next record of 20 words: 48 + 20 > 64 have been reserved.
    segment.arena.store_u64(21, 0, 0, 48 + 20)
    ((_, lost),) = reader.read()
    assert lost
    segment.arena.write_demand(0, 0, np.array([[8]], np.int32), None)  # its successor
    ((records, lost),) = reader.read()
    assert not lost and records[HEADER_WORDS + 1] == 8


def test_nor_are_they_after_its_successor_has_written_less(segment: Segment) -> None:
    for _ in range(4):
        segment.arena.write_demand(0, 0, np.array([[1, 2, 3]], np.int32), None)
    segment.arena.store_u64(21, 0, 0, 48 + 20)  # killed, as above, with the first words of the ring overwritten
    segment.view(Section.DEMANDS)[0, DEMAND_RING_HEADER // 2 :][:4] = 0xFFFF
    segment.arena.write_demand(0, 0, np.array([[8]], np.int32), None)
    ((records, lost),) = DemandReader(segment).read()  # of a pager that has just begun
    assert lost and not len(records)


def test_an_arena_without_rings_takes_demands_and_has_none() -> None:
    segment = Segment.private(Geometry(num_layers=1, num_experts=8))
    segment.arena.write_demand(0, 0, np.array([[1]], np.int32), None)
    assert list(DemandReader(segment).read()) == []
    segment.close()


def test_what_does_not_fit_is_refused(segment: Segment) -> None:
    write = segment.arena.write_demand
    with pytest.raises(ValueError, match="a demand of 1 rows of 24 experts does not fit half of the ring of 64 words"):
        write(0, 0, np.zeros((1, 24), np.int32), None)
    with pytest.raises(ValueError, match="expert is 70, expected 0 <= expert < 70"):
        write(0, 0, np.array([[70]], np.int32), None)
    with pytest.raises(ValueError, match="stream is -1"):
        write(0, 0, np.array([[0]], np.int32), np.array([-1], np.int32))
    with pytest.raises(IndexError, match="layer is 3"):
        write(0, 3, np.array([[0]], np.int32), None)
    with pytest.raises(ValueError, match="demand_words is 100, expected 0 or a power of two"):
        Geometry(num_layers=1, num_experts=8, demand_words=100)
