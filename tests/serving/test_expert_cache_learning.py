"""An expert cache with a router on it, and what eviction learns of its use."""

from __future__ import annotations

import numpy as np
import pytest
from instances import wait_until
from shipped_experts import EXPERTS, LAYERS, evict_all

from hotset.runtime import (
    ExpertCache,
    RouterConfig,
)
from hotset.shm.demands import NO_STREAM, DemandReader, split_records


def test_a_router_prefers_what_the_pager_says_is_in_memory(cache: ExpertCache) -> None:
    evict_all(cache)
    with cache.pinned(1, [20, 21, 22, 23]) as pinned:
        [*pinned.values()]
    router = cache.router(RouterConfig(EXPERTS, 4, policy="bonus", cache_bonus=1.0))
    logits = np.linspace(1, 0, EXPERTS, dtype=np.float32)[np.newaxis]
    experts, _, misses = router.route_batch(logits, 1)
    assert {*experts[0].tolist()} == {20, 21, 22, 23} and not misses
    assert router.route_batch(logits, 1, policy="off").experts[0].tolist() == [0, 1, 2, 3]
    before = router.affinity.activation_count(20, layer=1)
    with cache.pinned(1, experts):  # the router has counted that use
        assert router.affinity.activation_count(20, layer=1) == before
    with pytest.raises(ValueError, match="num_experts is 8, expected 32"):
        cache.router(RouterConfig(8, 2))


def test_use_is_counted_for_the_affinity_where_no_router_does_it() -> None:
    with ExpertCache(expert_budget="25%", warm_start=False) as cache:
        for _ in range(5):
            with cache.pinned(2, [4, 6]):
                pass
        affinity = cache.router(RouterConfig(EXPERTS, 4)).affinity
        assert affinity.activation_counts(layer=2)[[4, 5, 6]].tolist() == [5, 0, 5]
        assert affinity.top_k_by_affinity(2, layer=2) == [4, 6]


def test_eviction_is_told_what_each_stream_wanted() -> None:
    with ExpertCache(expert_budget="25%", processes=2, streams=3, warm_start=False) as cache:
        with ExpertCache.attach(cache.name) as other:
            reader = DemandReader(cache._reader._segment)
            with cache.pinned(0, [1, 2]):
                pass
            with cache.pinned(1, [[1, 2], [2, 3]], wanted=[[7, 8], [8, 9]], streams=[2, 0]):
                pass
            with cache.pinned(2, [[1, 2], [2, 3]], prefill=True):
                pass
            with cache.pinned(3, [[e] for e in (4, 5, 4, 5)]):  # more than there are streams
                pass
            with other.pinned(3, [6]):
                pass
            written = [record.tolist() for records, _ in reader.read() for record in split_records(records.copy())]
        bodies = [(record[1], record[8:]) for record in written]
        assert bodies == [
            (0, [0, 1, 2]),
            (1, [2, 7, 8, 0, 8, 9]),
            (2, [NO_STREAM, 1, 2, 3]),
            (3, [NO_STREAM, 4, 5]),
            (3, [3, 6]),
        ]


def test_eviction_learns_from_what_is_pinned() -> None:
    with ExpertCache(expert_budget="25%", eviction="affinity", read_lanes=1, warm_start=False) as cache:
        for turn in range(120):
            for layer in range(LAYERS):
                experts = [0, 1, 8 + turn % 24]  # two that are wanted always, and one that comes round
                with cache.pinned(layer, experts) as pinned:
                    [*pinned.values()]
            if turn == 60:
                cache.reset_stats()
        hits = cache.stats()
        assert hits.expert_hits >= 2 * LAYERS * 59  # the two never go


def test_the_next_cache_begins_with_what_the_last_one_had() -> None:
    with ExpertCache(expert_budget="25%") as cache:
        for _ in range(3):
            with cache.pinned(2, [11, 12, 13]) as pinned:
                [*pinned.values()]
    with ExpertCache(expert_budget="25%") as cache:
        assert wait_until(lambda: cache.resident(2)[[11, 12, 13]].all())
        assert cache.stats().warm_page_ins == 3 and cache.stats().expert_misses == 0
