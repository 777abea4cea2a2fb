"""What the pager does for each urgent request, in two calls: which of them need a load, and a slot that begins one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hotset.shm import _core
from hotset.shm.counters import Counter
from hotset.shm.layout import COUNTERS_PER_PROCESS, SlotState
from hotset.shm.segment import Segment

WORKER, PAGER = 0, 2


@pytest.fixture
def arena(private: Segment) -> _core.Arena:
    """Expert 3 in slot 0, pinned; 80 in slot 1."""
    arena = private.arena
    for slot, expert in ((0, 3), (1, 80)):
        arena.load_begin(slot, expert)
        arena.load_publish(slot, 99, 100, 1, 0)
    arena.want(WORKER, 0, 3)
    return arena


def counts(arena: _core.Arena) -> tuple[int, int]:
    totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
    arena.counter_totals(totals)
    return int(totals[Counter.EVICTIONS]), int(totals[Counter.EVICTIONS_REFUSED])


def test_the_first_victim_that_nobody_pins_makes_room(arena: _core.Arena) -> None:
    arena.request_urgent(7)
    assert arena.load_first([0, 1, 2], 7, True, PAGER) == 1
    assert arena.slot(0)[1:] == (3, SlotState.RESIDENT)
    assert arena.slot(1)[1:] == (7, SlotState.LOADING)
    assert arena.find(3) == 0 and arena.find(80) < 0
    assert not arena.requested(7, True)
    assert counts(arena) == (1, 1)


def test_an_empty_slot_is_no_eviction(arena: _core.Arena) -> None:
    assert arena.load_first([2], 7, False, PAGER) == 2
    assert counts(arena) == (0, 0)


def test_a_load_that_may_be_given_up_keeps_the_urgent_bit(arena: _core.Arena) -> None:
    arena.request_urgent(7)
    arena.request_prefetch(7)
    arena.load_first([2], 7, False, PAGER)
    assert arena.requested(7, True) and not arena.requested(7, False)


def test_no_slot_is_taken_from_pins_nor_from_another_load(arena: _core.Arena) -> None:
    arena.prefetch_begin(2, 150)
    arena.request_urgent(7)
    assert arena.load_first([0, 2], 7, True, PAGER) == -1
    assert arena.load_first([], 7, True, PAGER) == -1
    assert arena.requested(7, True)
    assert arena.slot(2)[1:] == (150, SlotState.LOADING)


def test_no_more_victims_are_looked_for_than_needed(arena: _core.Arena) -> None:
    def slots() -> Iterator[int]:
        yield 0
        yield 1
        raise AssertionError("slot 1 could be had")

    assert arena.load_first(slots(), 7, True, PAGER) == 1


def test_what_goes_wrong_while_victims_are_looked_for_is_not_hidden(arena: _core.Arena) -> None:
    def slots() -> Iterator[int]:
        yield 0
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        arena.load_first(slots(), 7, True, PAGER)
    with pytest.raises(IndexError, match=r"^slot is 5, expected 0 <= slot < 5$"):
        arena.load_first([0, 5], 7, True, PAGER)
    with pytest.raises(IndexError, match=r"^expert id is -1"):
        arena.load_first([1], -1, True, PAGER)
    with pytest.raises(IndexError, match=r"^process is 3"):
        arena.load_first([1], 7, True, 3)
    with pytest.raises(TypeError):
        arena.load_first(1, 7, True, PAGER)
    with pytest.raises(ValueError, match="expert 80 is in slot 1 already"):
        arena.load_first([2], 80, True, PAGER)
    assert arena.find(80) == 1 and arena.slot(2)[2] == SlotState.EMPTY


def test_what_is_there_or_cannot_be_had_is_answered(arena: _core.Arena) -> None:
    arena.set_failed(9)
    for expert in (3, 7, 9):
        arena.request_urgent(expert)
    generation = arena.generation(0)
    assert arena.unanswered([3, 7, 8, 9]) == [7]  # nobody asks for 8
    assert arena.urgent_requests() == [7]
    assert arena.generation(0) == generation + 2  # who waits for 3 and 9 looks again


def test_what_is_being_loaded_is_not_answered_yet(arena: _core.Arena) -> None:
    """As a prefetch, which may be given up."""
    arena.prefetch_begin(2, 150)
    arena.request_urgent(150)
    assert arena.unanswered({150: None}) == [150]
    assert arena.requested(150, True)


def test_requests_of_experts_that_there_are_not_are_refused(arena: _core.Arena) -> None:
    arena.request_urgent(7)
    with pytest.raises(IndexError, match=r"^expert id is -1"):
        arena.unanswered([7, -1])
    with pytest.raises(TypeError):
        arena.unanswered(7)
    assert arena.requested(7, True)
