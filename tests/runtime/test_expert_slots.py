"""How a budget becomes expert slots of several sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.runtime.expert_slots import ExpertClass, all_nbytes, expert_budget_nbytes, least_slots, split_slots
from hotset.shm.geometry import SlotClass

PAGE = 4096
MIXED = (ExpertClass(12, 8 * PAGE), ExpertClass(77, 4 * PAGE), ExpertClass(39, 2 * PAGE))

classes = st.lists(
    st.builds(ExpertClass, st.integers(1, 300), st.integers(1, 40).map(lambda pages: pages * PAGE)),
    min_size=1,
    max_size=3,
    unique_by=lambda experts: experts.nbytes,
)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 20_000), st.integers(1, 12))
def test_slots_of_one_size_are_as_many_as_fit(count: int, pages: int, budget_pages: int, least: int) -> None:
    fitting = min(count, budget_pages // pages)
    split = split_slots(budget_pages * PAGE, [ExpertClass(count, pages * PAGE)], least)
    assert split == ((SlotClass(fitting, pages * PAGE),) if fitting >= min(least, count) else None)


@given(classes, st.integers(0, 20_000), st.integers(1, 12))
def test_slots_fit_the_budget_and_leave_no_room_for_another(
    classes: list[ExpertClass], budget_pages: int, least: int
) -> None:
    budget = budget_pages * PAGE
    split = split_slots(budget, classes, least)
    needed = sum(slots.count * slots.nbytes for slots in least_slots(classes, least))
    assert (split is None) == (needed > budget)
    if split is None:
        return
    left = budget - sum(slots.count * slots.nbytes for slots in split)
    assert left >= 0
    for slots, experts in zip(split, classes, strict=True):
        assert slots.nbytes == experts.nbytes
        assert min(least, experts.count) <= slots.count <= experts.count
        assert slots.count == experts.count or slots.nbytes > left


def test_every_size_gets_the_same_share() -> None:
    split = split_slots(all_nbytes(MIXED) // 2, MIXED, 5)
    assert split is not None
    assert [slots.count for slots in split] == [6, 38, 20]


def test_what_is_used_more_gets_a_larger_share() -> None:
    """In proportion to the square of its heat, until it is all there."""
    classes = [ExpertClass(40, 4 * PAGE, 1.0), ExpertClass(40, 2 * PAGE, 0.5)]
    split = split_slots(all_nbytes(classes) // 2, classes, 1)
    assert split is not None
    assert split[0].count == pytest.approx(4 * split[1].count, abs=4)
    hot = [ExpertClass(10, 4 * PAGE, 4.0), ExpertClass(100, 2 * PAGE, 0.7)]
    split = split_slots(all_nbytes(hot) // 2, hot, 1)
    assert split == (SlotClass(10, 4 * PAGE), SlotClass(40, 2 * PAGE))


def test_what_was_never_used_still_gets_some() -> None:
    split = split_slots(400 * PAGE, [ExpertClass(100, 4 * PAGE, 1.0), ExpertClass(100, 2 * PAGE, 0.0)], 1)
    assert split is not None
    assert split[1].count >= 1


def test_a_small_budget_still_has_the_least_of_every_size() -> None:
    assert least_slots(MIXED, 20) == (SlotClass(12, 8 * PAGE), SlotClass(20, 4 * PAGE), SlotClass(20, 2 * PAGE))
    needed = (12 * 8 + 20 * 4 + 20 * 2) * PAGE
    assert split_slots(needed, MIXED, 20) == least_slots(MIXED, 20)
    assert split_slots(needed - 1, MIXED, 20) is None


def test_a_percentage_is_of_experts() -> None:
    assert expert_budget_nbytes("25%", [ExpertClass(10, PAGE)]) == 2 * PAGE
    assert expert_budget_nbytes("100 %", MIXED) == all_nbytes(MIXED)
    assert expert_budget_nbytes("1MiB", MIXED) == 2**20
    for wrong in ("0%", "101%", "many%"):
        with pytest.raises(ValueError, match=f"the expert budget is '{wrong}', expected a percentage"):
            expert_budget_nbytes(wrong, MIXED)
