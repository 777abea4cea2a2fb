"""The pager's side: victims from what the workers wrote into their rings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.segment import Segment
from hotset.workers.eviction.policy import Eviction

PAGER = 2


@pytest.fixture
def segment() -> Iterator[Segment]:
    """2 layers of 8 experts, 8 slots; two workers and the pager."""
    segment = Segment.private(
        Geometry(
            num_layers=2,
            num_experts=8,
            num_processes=3,
            slot_classes=(SlotClass(8, 64),),
            max_sequences=4,
            max_model_len=16,
            demand_words=1024,
        )
    )
    yield segment
    segment.close()


def use(segment: Segment, process: int, layer: int, *experts: int) -> None:
    segment.arena.write_demand(process, layer, np.array([experts], np.int32), np.array([process], np.int32))


def victims(eviction: Eviction, *experts: int) -> list[int]:
    order = list(eviction.order(np.array(experts)))
    return [experts[index] for index in order]


def test_the_least_recently_used_of_all_layers_goes_first(segment: Segment) -> None:
    eviction = Eviction("lru", segment, PAGER)
    use(segment, 0, 0, 3)
    use(segment, 0, 1, 5)
    use(segment, 0, 0, 1)
    assert victims(eviction, 1, 3, 8 + 5, 8 + 6) == [8 + 6, 3, 8 + 5, 1]


def test_what_several_workers_used_counts_in_the_order_in_which_they_used_it(segment: Segment) -> None:
    eviction = Eviction("lru", segment, PAGER)
    use(segment, 1, 0, 3)
    use(segment, 0, 0, 5)
    use(segment, 1, 0, 6)
    use(segment, 0, 0, 7)
    assert victims(eviction, 5, 3, 7, 6) == [3, 5, 6, 7]


@pytest.mark.parametrize("policy", ["affinity", "lfu@bypass", "adaptive", "lru+affinity:0.5", "td"])
def test_every_policy_keeps_what_is_used_all_the_time(segment: Segment, policy: str) -> None:
    eviction = Eviction(policy, segment, PAGER)
    for step in range(400):
        use(segment, step % 2, 0, 2, 4 + step % 4)
        use(segment, step % 2, 1, 6, step % 4)
        eviction.learn()
    # 7 and 8 + 3 have just been used, and are needed again after the others that take turns.
    order = victims(eviction, 1, 2, 7, 8 + 3, 8 + 6, 8 + 7)
    assert set(order[-2:]) == {2, 8 + 6}
    assert order[0] in (1, 8 + 7)  # never used


def test_a_layer_at_its_floor_loses_experts_last(segment: Segment) -> None:
    eviction = Eviction("lru@bypass", segment, PAGER)
    use(segment, 0, 1, 5)
    for expert in range(4):
        use(segment, 0, 0, expert)
    assert victims(eviction, 0, 1, 2, 3, 8 + 5) == [0, 1, 2, 3, 8 + 5]


def test_only_those_with_a_fitting_slot_go_but_all_count_for_a_layers_floor(segment: Segment) -> None:
    eviction = Eviction("lru@bypass", segment, PAGER)
    use(segment, 0, 1, 5)
    for expert in range(4):
        use(segment, 0, 0, expert)
    experts, fitting = np.array([0, 1, 2, 3, 8 + 5]), np.array([False, False, True, True, True])
    assert experts[list(eviction.order(experts, among=fitting))].tolist() == [2, 3, 8 + 5]


def test_a_newcomer_takes_the_place_of_its_own_layer_where_values_cannot_be_compared(segment: Segment) -> None:
    eviction = Eviction("lfu@bypass", segment, PAGER)
    for expert in range(4):
        use(segment, 0, 1, expert)
        for _ in range(1 + expert):
            use(segment, 0, 0, expert)
    full = np.array([0, 1, 2, 3, 8, 9, 10, 11])  # both layers have their share
    assert full[next(eviction.order(full, 8 + 5))] == 8
    assert full[next(eviction.order(full, 5))] == 0
    unequal = np.array([0, 1, 2, 3, 4, 8, 9, 10])  # layer 0 has more: it gives
    assert unequal[next(eviction.order(unequal, 8 + 5))] == 4


def test_one_off_experts_go_one_after_the_other_while_the_rest_stays(segment: Segment) -> None:
    """Bypass: one slot is for what is worth less than everything that is resident."""
    eviction = Eviction("affinity@bypass", segment, PAGER)
    resident = [0, 1, 2, 3, 8, 9, 10, 11]
    for _ in range(20):
        use(segment, 0, 0, 0, 1, 2, 3)
        use(segment, 0, 1, 0, 1, 2, 3)
    evicted = list[int]()
    for newcomer in (4, 5, 6, 7, 4):
        use(segment, 0, 0, newcomer)
        victim = resident[next(eviction.order(np.array(resident), newcomer))]
        resident[resident.index(victim)] = newcomer
        evicted.append(victim)
    assert evicted[1:] == [4, 5, 6, 7]


def test_what_is_admitted_stays_for_its_step(segment: Segment) -> None:
    for policy, victim in (("affinity@always", 0), ("affinity@bypass", 4)):
        eviction = Eviction(policy, segment, PAGER)
        for _ in range(20):
            use(segment, 0, 0, 0, 1, 2, 3)
        use(segment, 0, 0, 4)
        resident = np.array([4, 1, 2, 3, 0])
        assert resident[next(eviction.order(resident, 5))] == victim


def test_a_new_pager_begins_with_the_affinity_that_the_arena_holds(segment: Segment) -> None:
    ExpertAffinity(AffinityConfig(8), segment=segment).update([3], layer=0)
    assert victims(Eviction("affinity", segment, PAGER), 2, 3, 4) == [2, 4, 3]


def test_a_resident_expert_yields_to_a_prefetch_unless_it_is_likelier_to_be_used(segment: Segment) -> None:
    eviction = Eviction("affinity", segment, PAGER)
    for _ in range(60):
        use(segment, 0, 0, 3)
    use(segment, 0, 0, 5)
    use(segment, 0, 0, 6)
    list(eviction.order(np.array([2, 3, 5, 6]), 4))
    assert eviction.yields(5)
    assert not eviction.yields(3)  # used in 60 of the latest 62 steps
    assert not eviction.yields(6)  # the latest step needs it
    assert Eviction("lru", segment, PAGER).yields(3)  # its values do not say how likely
