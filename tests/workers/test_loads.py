"""What becomes of loads that are given up, paged out or waited for while the lanes are at them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hotset.shm.counters import Counter
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.layout import COUNTERS_PER_PROCESS, SlotState
from hotset.shm.segment import Segment
from hotset.workers.eviction.policy import Eviction
from hotset.workers.loads import Loads
from hotset.workers.read_lanes import Load
from hotset.workers.slots import Slots

PAGER = 1


class PlayedLanes:
    """Loads end when the test says so."""

    def __init__(self) -> None:
        self.begun: list[Load] = []
        self._finished: list[Load] = []

    def begin(self, load: Load) -> None:
        self.begun.append(load)

    def promote(self, load: Load) -> bool:
        load.urgent |= not load.cancelled and not load.finished
        return not load.cancelled

    def cancel(self, load: Load) -> None:
        if not load.urgent and not load.finished:
            load.cancelled = True
            self.end(load)

    def end(self, load: Load) -> None:
        load.finished = True
        self._finished.append(load)

    def take_finished(self) -> list[Load]:
        finished, self._finished = self._finished, []
        return finished


class Store:
    def nbytes(self, expert: int) -> int:
        return 64


class Played:
    """One layer of 8 experts, 4 slots."""

    def __init__(self) -> None:
        geometry = Geometry(num_layers=1, num_experts=8, num_processes=2, slot_classes=(SlotClass(4, 64),))
        self.segment = Segment.private(geometry)
        self.arena = self.segment.arena
        self.slots = Slots(
            self.arena, PAGER, geometry, dict.fromkeys(range(8), 0), Eviction("lru", self.segment, PAGER)
        )
        self.lanes = PlayedLanes()
        self.given_up: list[int] = []
        self.loads = Loads(
            self.arena,
            PAGER,
            8,
            Store(),  # type: ignore[arg-type]
            self.lanes,  # type: ignore[arg-type]
            self.slots,
            on_failure=lambda error: None,
            on_give_up=self.given_up.append,
        )

    def begin(self, expert: int, *, warm_start: bool = False) -> Load:
        slot = self.slots.take_empty(expert)
        assert slot is not None
        self.loads.begin(expert, slot, urgent=False, warm_start=warm_start)
        return self.lanes.begun[-1]

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
    played.lanes.end(played.begin(3, warm_start=warm_start))
    played.loads.finish()
    assert played.arena.find(3) >= 0


def test_what_is_paged_out_when_it_has_just_been_read_goes_again(played: Played) -> None:
    load = played.begin(3)
    played.lanes.end(load)
    assert played.loads.page_out(3)
    played.loads.finish()
    assert played.arena.find(3) < 0
    assert played.states() == [SlotState.EMPTY] * 4
    assert played.count(Counter.PAGE_OUTS) == 1


def test_what_somebody_waits_for_is_not_paged_out(played: Played) -> None:
    load = played.begin(3)
    assert played.arena.request_urgent(3)
    assert played.loads.overtake(3)
    assert not played.arena.requested(3, True)
    assert not played.loads.is_disk_idle()
    played.loads.page_out(3)
    played.lanes.end(load)
    played.loads.finish()
    assert played.arena.find(3) >= 0
    assert played.loads.is_disk_idle()
    assert played.count(Counter.URGENT_PAGE_INS) == 1
