"""The residency mask: the caller's on private memory, the pager's on an instance's arena."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import pytest

from hotset.runtime import MemoryAwareRouter, PagingRequest, ResidencyBelongsToPager, RouterConfig
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.segment import InstanceLock, Segment, remove_ipc_objects

GEOMETRY = Geometry(num_layers=2, num_experts=70, num_processes=2, pins_per_process=2, slot_classes=(SlotClass(3, 64),))


@pytest.mark.parametrize("experts", [8, 64, 128, 129, 512])
def test_any_number_of_experts(experts: int) -> None:
    router = MemoryAwareRouter(RouterConfig(experts, 2))
    router.update_cache_state([0, experts // 2, experts - 1])
    assert router.resident_experts() == [0, experts // 2, experts - 1]
    router.set_resident(experts - 1, False)
    router.set_resident(1, True)
    assert router.resident_experts() == [0, 1, experts // 2]
    assert [router.is_resident(e) for e in (0, 1, 2, experts - 1)] == [True, True, False, False]
    router.update_cache_state([2])
    assert router.resident_experts() == [2]


def test_layers_have_masks_of_their_own() -> None:
    router = MemoryAwareRouter(RouterConfig(), num_layers=2)
    router.update_cache_state([3], layer=1)
    assert (router.resident_experts(0), router.resident_experts(1)) == ([], [3])


def test_hits_and_misses_are_counted_per_selection() -> None:
    router = MemoryAwareRouter(RouterConfig(8, 2, cache_bonus=0.0))
    router.update_cache_state([0])
    assert router.hit_rate() == 0.0
    router.route_batch(np.array([[9, 8] + [0] * 6, [9, 0, 8] + [0] * 5], np.float32))
    summary = router.metrics.summary()
    assert (summary.cache_hits, summary.cache_misses) == (2, 2)
    assert router.hit_rate() == 0.5


def test_prefetch_requests_are_the_absent_experts_of_highest_affinity() -> None:
    router = MemoryAwareRouter(RouterConfig(), num_layers=2)
    for ids in ([1, 2], [2, 5], [2, 5]):
        router.affinity.update(ids, layer=1)
    router.set_resident(2, True, layer=1)
    expected = [PagingRequest.prefetch(5, 1), PagingRequest.prefetch(1, 1)]
    assert router.generate_prefetch_requests(2) == expected
    assert router.generate_prefetch_requests(2, layer=1) == expected
    assert len(router.generate_prefetch_requests(100)) == 15
    assert router.generate_prefetch_requests(0) == []


@pytest.fixture
def shared() -> Iterator[Segment]:
    instance = f"routing-{secrets.token_hex(4)}"
    lock = InstanceLock(instance)
    segment = Segment.create(instance, GEOMETRY)
    yield segment
    segment.close()
    remove_ipc_objects(instance)
    lock.release()


class TestOnASharedArena:
    def test_the_pagers_slots_are_what_is_resident(self, shared: Segment) -> None:
        router = MemoryAwareRouter(RouterConfig(70, 2), segment=shared, process=1)
        assert router.num_layers == 2
        arena = shared.arena
        arena.load_begin(0, 70 + 66)
        arena.load_publish(0, 0, 64, 0, False)
        assert router.resident_experts(1) == [66]
        result = router.route_batch(np.zeros((1, 70), np.float32), 1)
        assert result.experts.tolist() == [[66, 0]]
        assert result.misses == {0}

    @pytest.mark.parametrize("prefer", [True, False])
    def test_an_expert_being_loaded_may_be_preferred_but_is_no_hit(self, shared: Segment, prefer: bool) -> None:
        router = MemoryAwareRouter(RouterConfig(70, 1, prefer_loading=prefer), segment=shared)
        shared.arena.load_begin(0, 66)
        result = router.route_batch(np.zeros((1, 70), np.float32))
        assert result.experts.tolist() == [[66 if prefer else 0]]
        assert router.metrics.summary().cache_hits == 0

    def test_an_expert_being_loaded_is_waited_for_and_stands_in_for_none(self, shared: Segment) -> None:
        router = MemoryAwareRouter(RouterConfig(70, 2, policy="substitute", substitute_limit=2.0), segment=shared)
        shared.arena.load_begin(0, 66)
        shared.arena.load_begin(1, 50)
        shared.arena.load_publish(1, 0, 64, 0, False)
        logits = np.zeros((2, 70), np.float32)
        logits[:, 66] = -5  # the least of all
        logits[1, 66] = 5
        assert router.route_batch(logits).experts.tolist() == [[0, 50], [66, 50]]

    def test_the_mask_cannot_be_written(self, shared: Segment) -> None:
        router = MemoryAwareRouter(RouterConfig(70, 2), segment=shared)
        for write in (lambda: router.set_resident(1, True), lambda: router.update_cache_state([1])):
            with pytest.raises(ResidencyBelongsToPager, match="only the pager changes what is resident"):
                write()
        assert router.resident_experts() == []

    def test_counts_are_summed_over_processes(self, shared: Segment) -> None:
        routers = [MemoryAwareRouter(RouterConfig(70, 2), segment=shared, process=p) for p in range(2)]
        for router in routers:
            router.route_batch(np.zeros((3, 70), np.float32))
        for router in routers:
            assert router.metrics.summary().routing_decisions == 6
            assert router.affinity.activation_count(0) == 6
        assert routers[0].affinity.snapshot()[1].max() == 6

    def test_closing_a_router_leaves_the_arena_open(self, shared: Segment) -> None:
        MemoryAwareRouter(RouterConfig(70, 2), segment=shared).close()
        MemoryAwareRouter(RouterConfig(70, 2), segment=shared).route(np.zeros(70, np.float32))

    def test_a_process_out_of_range_is_refused(self, shared: Segment) -> None:
        with pytest.raises(IndexError, match="process is 2, expected 0 <= process < 2"):
            MemoryAwareRouter(RouterConfig(70, 2), segment=shared, process=2)
