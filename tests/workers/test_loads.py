"""What becomes of loads that are given up, paged out or waited for while the lanes are at them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from hotset.shm.counters import Counter
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.layout import COUNTERS_PER_PROCESS, SlotState, WeightFormat
from hotset.shm.segment import Segment
from hotset.workers.eviction.policy import Eviction
from hotset.workers.loads import Loads
from hotset.workers.read_lanes import ReadLanes
from hotset.workers.slots import Slots

PAGER = 1


class PlayedLanes(ReadLanes):
    """Loads end when the test says so: it is the lane."""

    def end(self) -> None:
        """All loads that were begun."""
        while (run := self._lanes.take()) is not None:
            self._lanes.read(*run)


class Store:
    """Every expert is the same 64 bytes."""

    direct = False

    def __init__(self, file: int) -> None:
        self._file = file

    def pieces(self, expert: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return np.array([(0, self._file, 0, 0, 64)], np.int64), np.empty((0, 4), np.int64)

    def checksum(self, expert: int) -> int | None:
        return None

    def weight_format(self, expert: int) -> WeightFormat:
        return WeightFormat.BFLOAT16

    def verify(self, expert: int, checksum: int) -> None:
        assert checksum == xxhash.xxh3_64_intdigest(bytes(64))


class Played:
    """One layer of 8 experts, 4 slots."""

    def __init__(self) -> None:
        geometry = Geometry(num_layers=1, num_experts=8, num_processes=2, slot_classes=(SlotClass(4, 64),))
        self.segment = Segment.private(geometry)
        self.arena = self.segment.arena
        self.slots = Slots(
            self.arena, PAGER, geometry, dict.fromkeys(range(8), 0), Eviction("lru", self.segment, PAGER)
        )
        self.file = os.memfd_create("weights")
        os.write(self.file, bytes(64))
        store: Any = Store(self.file)
        self.lanes = PlayedLanes(store, self.segment.slots(), 0, self.segment, PAGER)
        self.given_up: list[int] = []
        self.loads = Loads(
            self.arena,
            PAGER,
            8,
            self.lanes,
            self.slots,
            on_failure=lambda error: None,
            on_give_up=self.given_up.append,
        )

    def begin(self, expert: int, *, warm_start: bool = False) -> None:
        slot = self.slots.take_empty(expert)
        assert slot is not None
        self.loads.begin(expert, slot, urgent=False, warm_start=warm_start)

    def states(self) -> list[int]:
        return [self.arena.slot(slot)[2] for slot in range(4)]

    def count(self, counter: Counter) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self.arena.counter_totals(totals)
        return int(totals[counter])


@pytest.fixture
def played() -> Iterator[Played]:
    played = Played()
    yield played
    played.lanes.close()
    os.close(played.file)
    played.segment.close()


def test_a_warm_start_that_is_in_the_way_comes_back(played: Played) -> None:
    played.begin(3, warm_start=True)
    played.loads.cancel_prefetches()
    played.loads.finish()
    assert played.given_up == [3]
    assert played.states() == [SlotState.EMPTY] * 4


@pytest.mark.parametrize("warm_start", [True, False])
def test_what_is_paged_out_while_it_is_read_does_not_come(played: Played, warm_start: bool) -> None:
    played.begin(3, warm_start=warm_start)
    assert played.loads.page_out(3)
    assert not played.loads.page_out(4)
    played.loads.finish()
    assert played.given_up == []
    assert played.arena.find(3) < 0
    assert played.states() == [SlotState.EMPTY] * 4
    assert 3 not in played.loads
    # The next one of the same expert has nothing to do with it.
    played.begin(3, warm_start=warm_start)
    played.lanes.end()
    played.loads.finish()
    assert played.arena.find(3) >= 0


def test_what_is_paged_out_when_it_has_just_been_read_goes_again(played: Played) -> None:
    played.begin(3)
    played.lanes.end()
    assert played.loads.page_out(3)
    played.loads.finish()
    assert played.arena.find(3) < 0
    assert played.states() == [SlotState.EMPTY] * 4
    assert played.count(Counter.PAGE_OUTS) == 1


def test_what_somebody_waits_for_is_not_paged_out(played: Played) -> None:
    played.begin(3)
    assert played.arena.request_urgent(3)
    assert played.loads.overtake(3)
    assert not played.arena.requested(3, True)
    assert not played.loads.is_disk_idle()
    played.loads.page_out(3)
    played.lanes.end()
    played.loads.finish()
    assert played.arena.find(3) >= 0
    assert played.loads.is_disk_idle()
    assert played.count(Counter.URGENT_PAGE_INS) == 1
