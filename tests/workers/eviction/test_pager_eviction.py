"""The pager's side: victims from what the workers wrote into their rings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.shm.layout import Geometry, SlotClass
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


@pytest.mark.parametrize("policy", ["affinity", "lfu@bypass", "adaptive", "lru+affinity:0.5", "td"])
def test_every_policy_keeps_what_is_used_all_the_time(segment: Segment, policy: str) -> None:
    eviction = Eviction(policy, segment, PAGER)
    for step in range(400):
        use(segment, step % 2, 0, 2, 4 + step % 4)
        use(segment, step % 2, 1, 6, step % 4)
        eviction.learn()
    order = victims(eviction, 1, 2, 4, 8 + 1, 8 + 6, 8 + 7)
    assert set(order[-2:]) == {2, 8 + 6}
    assert order[0] in (1, 8 + 7)  # never used


def test_a_layer_at_its_floor_loses_experts_last(segment: Segment) -> None:
    eviction = Eviction("lru@bypass", segment, PAGER)
    use(segment, 0, 1, 5)
    for expert in range(4):
        use(segment, 0, 0, expert)
    assert victims(eviction, 0, 1, 2, 3, 8 + 5) == [0, 1, 2, 3, 8 + 5]


def test_a_new_pager_begins_with_the_affinity_that_the_arena_holds(segment: Segment) -> None:
    ExpertAffinity(AffinityConfig(8), segment=segment).update([3], layer=0)
    assert victims(Eviction("affinity", segment, PAGER), 2, 3, 4) == [2, 4, 3]


def test_a_resident_expert_yields_to_a_prefetch_unless_it_is_likelier_to_be_used(segment: Segment) -> None:
    eviction = Eviction("affinity", segment, PAGER)
    for _ in range(60):
        use(segment, 0, 0, 3)
    use(segment, 0, 0, 5)
    use(segment, 0, 0, 6)
    victims(eviction, 3, 5, 6)
    assert eviction.yields(5)
    assert not eviction.yields(3)  # used in 60 of the latest 62 steps
    assert not eviction.yields(6)  # the latest step needs it
    assert Eviction("lru", segment, PAGER).yields(3)  # its values do not say how likely
