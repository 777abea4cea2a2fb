"""Metrics of routing and paging: sums over the rows of all processes, less what a reset took as its baseline."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import check_instance, integer
from hotset.shm.counters import Counter, Histogram
from hotset.shm.histogram import bucket_upper_bound, percentile_nanoseconds
from hotset.shm.layout import COUNTERS_PER_PROCESS, HISTOGRAM_BUCKETS
from hotset.shm.segment import Segment

TARGET_HIT_RATE = 0.70
TARGET_P99_ROUTING_MICROSECONDS = 15.0


class Latency(msgspec.Struct, frozen=True):
    """Microseconds. Percentiles come from a histogram and are at most 12.5 % too high."""

    mean: float
    max: float
    p50: float
    p99: float
    count: int


class MoeMetricsSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of `MoeMetrics`.

    Attributes:
        cache_hits, cache_misses: selected experts that were, or were not, resident.
        routing_decisions: tokens routed, per layer.
        routing_latency: per token; of a batch its mean.
        selections_changed: selected experts outside of their row's true top-k.
        lost_mass: gate probability that these changes gave up, summed over tokens.
    """

    cache_hits: int
    cache_misses: int
    experts_paged_in: int
    experts_paged_out: int
    routing_decisions: int
    routing_latency: Latency
    paging_latency: Latency
    prefetch_operations: int
    prefetch_hits: int
    affinity_evictions: int
    nan_logits: int
    rows_without_finite_logit: int
    selections_changed: int
    lost_mass: float

    @property
    def hit_rate(self) -> float:
        return _ratio(self.cache_hits, self.cache_hits + self.cache_misses)

    @property
    def prefetch_accuracy(self) -> float:
        return _ratio(self.prefetch_hits, self.prefetch_operations)

    @property
    def mean_lost_mass(self) -> float:
        """Per token."""
        return _ratio(self.lost_mass, self.routing_decisions)

    @property
    def changed_share(self) -> float:
        """Of all selections, those that the cache preference changed."""
        return _ratio(self.selections_changed, self.cache_hits + self.cache_misses)

    def meets_targets(self) -> bool:
        """Hit rate >= 0.70 and p99 routing latency <= 15 us."""
        return self.hit_rate >= TARGET_HIT_RATE and self.routing_latency.p99 <= TARGET_P99_ROUTING_MICROSECONDS


class MoeMetrics:
    """Counts and latencies of an arena.

    Args:
        segment: the arena.
        process: the row that the `record_` methods write.
    """

    def __init__(self, segment: Segment, process: int = 0) -> None:
        check_instance("segment", segment, Segment)
        self._arena = segment.arena
        self._process = integer("process", process, 0)
        self._counter_baseline = np.zeros(COUNTERS_PER_PROCESS, np.uint64)
        self._histogram_baselines = {h: np.zeros(HISTOGRAM_BUCKETS, np.uint64) for h in Histogram}

    def record_page_in(self, nanoseconds: int, *, prefetched: bool = False) -> None:
        """For an engine that pages experts itself; on a shared arena the pager does this."""
        self._arena.record_latency(self._process, Histogram.PAGING, nanoseconds)
        self._count(Counter.PREFETCH_PAGE_INS if prefetched else Counter.URGENT_PAGE_INS)

    def record_page_out(self) -> None:
        self._count(Counter.PAGE_OUTS)

    def record_prefetch_hit(self) -> None:
        """A prefetched expert was selected for the first time."""
        self._count(Counter.PREFETCH_HITS)

    def record_eviction(self) -> None:
        self._count(Counter.EVICTIONS)

    def _count(self, counter: Counter) -> None:
        self._arena.count(self._process, counter, 1)

    def summary(self) -> MoeMetricsSummary:
        totals = self._counters() - self._counter_baseline

        def count(counter: Counter) -> int:
            return int(totals[counter])

        return MoeMetricsSummary(
            cache_hits=count(Counter.CACHE_HITS),
            cache_misses=count(Counter.CACHE_MISSES),
            experts_paged_in=count(Counter.URGENT_PAGE_INS) + count(Counter.PREFETCH_PAGE_INS),
            experts_paged_out=count(Counter.PAGE_OUTS) + count(Counter.EVICTIONS),
            routing_decisions=count(Counter.ROUTING_DECISIONS),
            routing_latency=self._latency(Histogram.ROUTING, count(Counter.ROUTING_NANOSECONDS)),
            paging_latency=self._latency(Histogram.PAGING, count(Counter.PAGING_NANOSECONDS)),
            prefetch_operations=count(Counter.PREFETCH_PAGE_INS),
            prefetch_hits=count(Counter.PREFETCH_HITS),
            affinity_evictions=count(Counter.EVICTIONS),
            nan_logits=count(Counter.NAN_LOGITS),
            rows_without_finite_logit=count(Counter.ROWS_WITHOUT_FINITE_LOGIT),
            selections_changed=count(Counter.SELECTIONS_CHANGED),
            lost_mass=count(Counter.LOST_MASS_Q32) / 2**32,
        )

    def percentiles(self, histogram: Histogram) -> tuple[float, float]:
        """p50 and p99 since the last reset, microseconds; 0 without events."""
        buckets = self._histogram(histogram) - self._histogram_baselines[histogram]
        if not buckets.any():
            return 0.0, 0.0
        return percentile_nanoseconds(buckets, 0.50) / 1000, percentile_nanoseconds(buckets, 0.99) / 1000

    def hit_rate(self) -> float:
        return self.summary().hit_rate

    def prefetch_accuracy(self) -> float:
        return self.summary().prefetch_accuracy

    def meets_targets(self) -> bool:
        return self.summary().meets_targets()

    def reset(self) -> None:
        """Counts from here on; other readers, and the rows themselves, are not touched."""
        self._counter_baseline = self._counters()
        self._histogram_baselines = {h: self._histogram(h) for h in Histogram}

    def _counters(self) -> npt.NDArray[np.uint64]:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self._arena.counter_totals(totals)
        return totals

    def _histogram(self, histogram: Histogram) -> npt.NDArray[np.uint64]:
        totals = np.empty(HISTOGRAM_BUCKETS, np.uint64)
        self._arena.histogram_totals(histogram, totals)
        return totals

    def _latency(self, histogram: Histogram, nanoseconds: int) -> Latency:
        buckets = self._histogram(histogram) - self._histogram_baselines[histogram]
        count = int(buckets.sum())
        if count == 0:
            return Latency(0.0, 0.0, 0.0, 0.0, 0)
        maximum = Counter.PAGING_MAX_NANOSECONDS
        if histogram is Histogram.ROUTING:
            maximum = Counter.ROUTING_MAX_NANOSECONDS
        # The counter knows the exact maximum but not a reset; the histogram knows both to 12.5 %.
        slowest = min(int(self._counters()[maximum]), bucket_upper_bound(int(np.flatnonzero(buckets)[-1])))
        return Latency(
            mean=nanoseconds / count / 1000,
            max=slowest / 1000,
            p50=min(slowest, percentile_nanoseconds(buckets, 0.50)) / 1000,
            p99=min(slowest, percentile_nanoseconds(buckets, 0.99)) / 1000,
            count=count,
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
