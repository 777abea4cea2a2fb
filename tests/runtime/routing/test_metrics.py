"""Counts, latencies and targets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotset.runtime import Latency, MemoryAwareRouter, MoeMetrics, RouterConfig
from hotset.shm import _core
from hotset.shm.counters import Histogram
from hotset.shm.geometry import Geometry
from hotset.shm.histogram import bucket_upper_bound, percentile_nanoseconds
from hotset.shm.layout import HISTOGRAM_BUCKETS, Section
from hotset.shm.segment import Segment


@pytest.fixture
def segment() -> Segment:
    return Segment.private(Geometry(num_layers=1, num_experts=8, num_processes=2))


def test_rates_are_zero_without_events(segment: Segment) -> None:
    summary = MoeMetrics(segment).summary()
    assert (summary.hit_rate, summary.prefetch_accuracy, summary.mean_lost_mass) == (0.0, 0.0, 0.0)
    assert summary.routing_latency == Latency(0.0, 0.0, 0.0, 0.0, 0)
    assert not summary.meets_targets()


def test_an_engine_that_pages_itself_records_it(segment: Segment) -> None:
    mine, other = MoeMetrics(segment, 0), MoeMetrics(segment, 1)
    mine.record_page_in(2_000_000)
    other.record_page_in(4_000_000, prefetched=True)
    other.record_prefetch_hit()
    mine.record_page_out()
    mine.record_eviction()
    summary = mine.summary()
    assert (summary.experts_paged_in, summary.experts_paged_out) == (2, 2)
    assert (summary.prefetch_operations, summary.prefetch_hits, summary.prefetch_accuracy) == (1, 1, 1.0)
    assert summary.affinity_evictions == 1
    assert summary.paging_latency.mean == 3000.0
    assert summary.paging_latency.max == 4000.0
    assert 2000 <= summary.paging_latency.p50 <= 2000 * 1.125
    assert summary.paging_latency.p99 == pytest.approx(4000, rel=0.125)


def test_reset_is_a_baseline_of_one_reader(segment: Segment) -> None:
    reader, other = MoeMetrics(segment), MoeMetrics(segment)
    reader.record_page_in(1000)
    reader.reset()
    assert reader.summary().paging_latency.count == 0
    reader.record_page_in(100)
    summary = reader.summary()
    assert summary.experts_paged_in == 1
    assert summary.paging_latency.max <= 0.1125  # not the 1 us from before
    assert other.summary().experts_paged_in == 2


def test_timing_can_be_switched_off() -> None:
    rows = np.zeros((5, 8), np.float32)
    timed, silent = (MemoryAwareRouter(RouterConfig(timing=timing)) for timing in (True, False))
    for router in (timed, silent):
        router.route_batch(rows)
        assert router.metrics.summary().routing_decisions == 5
    assert timed.metrics.summary().routing_latency.count == 5
    assert timed.metrics.summary().routing_latency.mean > 0
    assert silent.metrics.summary().routing_latency.count == 0


def test_targets_are_a_hit_rate_and_the_99th_percentile(segment: Segment) -> None:
    router = MemoryAwareRouter(RouterConfig(timing=False), segment=segment)
    router.route_batch(np.zeros((4, 8), np.float32))
    assert not router.metrics.meets_targets()  # nothing resident
    segment.view(Section.RESIDENT_MASK)[0, 0] = 0xFF
    router.reset_metrics()
    router.route_batch(np.zeros((4, 8), np.float32))
    assert router.metrics.meets_targets()
    for _ in range(100):
        segment.arena.record_latency(0, Histogram.ROUTING, 14_000)
    segment.arena.record_latency(0, Histogram.ROUTING, 1_000_000)  # one pre-emption spoils nothing
    assert router.metrics.meets_targets()
    for _ in range(2):
        segment.arena.record_latency(0, Histogram.ROUTING, 20_000)
    assert not router.metrics.meets_targets()


@given(st.integers(0, 10**10))
def test_a_bucket_holds_its_latency_within_an_eighth(nanoseconds: int) -> None:
    segment = Segment.private(Geometry(num_layers=1, num_experts=1))
    segment.arena.record_latency(0, Histogram.PAGING, nanoseconds)
    buckets = np.empty(HISTOGRAM_BUCKETS, np.uint64)
    segment.arena.histogram_totals(Histogram.PAGING, buckets)
    bound = bucket_upper_bound(int(np.flatnonzero(buckets)[0]))
    assert nanoseconds < bound <= max(nanoseconds * 9 / 8 + 1, 1)


def test_percentiles() -> None:
    buckets = np.zeros(HISTOGRAM_BUCKETS, np.uint64)
    assert percentile_nanoseconds(buckets, 0.5) == 0
    buckets[3], buckets[5], buckets[7] = 98, 1, 1
    shares = [percentile_nanoseconds(buckets, share) for share in (0.0, 0.5, 0.98, 0.99, 1.0)]
    assert shares == [4, 4, 4, 6, 8]


def test_the_arena_refuses_a_wrong_output(segment: Segment) -> None:
    with pytest.raises(ValueError, match=rf"out has shape \(3,\), expected \({_core.COUNTERS},\)"):
        segment.arena.counter_totals(np.zeros(3, np.uint64))
    with pytest.raises(TypeError, match="out has dtype float64, expected uint64"):
        segment.arena.counter_totals(np.zeros(_core.COUNTERS))
