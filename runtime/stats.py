"""Numbers about a running instance: the counters of all processes added up, and what is in memory now."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
from hotset.runtime.metrics import Latency, MoeMetrics, MoeMetricsSummary
from hotset.shm.counters import Counter
from hotset.shm.layout import COUNTERS_PER_PROCESS
from hotset.shm.segment import Segment


class BackendStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Counts are since the start, or since the last `reset_stats`.

    Hits and misses are counted per distinct expert per layer step, when the pin succeeds at once.
    """

    decode_expert_hits: int
    decode_expert_misses: int
    prefill_expert_hits: int
    prefill_expert_misses: int
    decode_tokens: int
    prefill_tokens: int
    steps: int
    urgent_page_ins: int
    prefetch_page_ins: int
    prefetch_hits: int
    evictions: int
    bytes_read: int
    routing_decisions: int
    routing: Latency
    paging: Latency
    lost_mass: float
    resident_experts: int
    resident_expert_bytes: int
    expert_budget_bytes: int
    kv_pages_used: int
    kv_pages_peak: int
    kv_pages_total: int
    requests_running: int
    requests_waiting: int
    preemptions: int
    worker_restarts: int
    pager_restarts: int
    pins_reclaimed: int
    workers: int

    @property
    def decode_hit_rate(self) -> float:
        return _ratio(self.decode_expert_hits, self.decode_expert_hits + self.decode_expert_misses)

    @property
    def prefill_hit_rate(self) -> float:
        return _ratio(self.prefill_expert_hits, self.prefill_expert_hits + self.prefill_expert_misses)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class InstanceCounters:
    """What the processes of an instance have counted since the last reset, added up."""

    def __init__(self, segment: Segment) -> None:
        self._arena = segment.arena
        self._metrics = MoeMetrics(segment)
        self._baseline = np.zeros(COUNTERS_PER_PROCESS, np.uint64)

    def reset(self) -> None:
        """A baseline is kept here; nobody's row is ever written by a reader."""
        self._baseline = self._totals()
        self._metrics.reset()

    def counts(self) -> dict[Counter, int]:
        totals = self._totals() - self._baseline
        return {counter: int(totals[counter]) for counter in Counter}

    def routing(self) -> MoeMetricsSummary:
        return self._metrics.summary()

    def _totals(self) -> npt.NDArray[np.uint64]:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self._arena.counter_totals(totals)
        return totals
