"""What an arena has counted, summed over all processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hotset.runtime.metrics import MoeMetrics
from hotset.shm.counters import Counter
from hotset.shm.layout import COUNTERS_PER_PROCESS, Section
from hotset.shm.segment import Segment


class ArenaCounters:
    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._arena = segment.arena
        geometry = segment.layout.geometry
        self._layers, self._experts = geometry.num_layers, geometry.num_experts

    def count(self, counter: Counter) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self._arena.counter_totals(totals)
        return int(totals[counter])

    def activations(self) -> npt.NDArray[np.int64]:
        """[layers, experts]."""
        totals = np.empty((self._layers, self._experts), np.uint64)
        self._arena.activation_totals(totals)
        return totals.astype(np.int64)

    def epochs(self) -> npt.NDArray[np.int64]:
        """Of affinity, [layers]."""
        return np.array([self._arena.load_u64(Section.LAYERS, layer, 0) for layer in range(self._layers)], np.int64)

    def of_run(self) -> dict[str, Any]:
        """For the report."""
        routing = MoeMetrics(self._segment).summary().routing_latency
        hits, misses = self.count(Counter.DECODE_EXPERT_HITS), self.count(Counter.DECODE_EXPERT_MISSES)
        return {
            "routes": self.count(Counter.ROUTING_DECISIONS),
            "p50_us": routing.p50,
            "p99_us": routing.p99,
            "expert_uses": hits + misses,
            "hit_rate": hits / max(1, hits + misses),
            "page_ins_urgent": self.count(Counter.URGENT_PAGE_INS),
            "page_ins_prefetch": self.count(Counter.PREFETCH_PAGE_INS),
            "evictions": self.count(Counter.EVICTIONS),
            "evictions_refused": self.count(Counter.EVICTIONS_REFUSED),
        }
