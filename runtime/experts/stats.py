"""Numbers about an expert cache: the counters of all processes that use it added up, and what is in memory now."""

from __future__ import annotations

import msgspec

from hotset.runtime.memory_tiers import MemoryTier, measured_tiers
from hotset.runtime.metrics import Latency
from hotset.runtime.stats import InstanceCounters
from hotset.runtime.user_pins import UserPins
from hotset.shm.counters import Counter
from hotset.shm.geometry import Geometry


class ExpertCacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Counts are since the start, or since the last `reset_stats`.

    A hit is an expert that was in memory when it was pinned; those of `pinned(..., prefill=True)` are counted apart.
    Page-ins are of experts that were waited for (urgent), that `prefetch` asked for, and that an earlier cache of the
    model had left a record of (warm).
    """

    expert_hits: int
    expert_misses: int
    prefill_expert_hits: int
    prefill_expert_misses: int
    expert_wait_seconds: float  # that processes waited for missing experts, added up
    urgent_page_ins: int
    prefetch_page_ins: int
    warm_page_ins: int
    prefetch_requests: int
    prefetch_hits: int
    evictions: int
    failed_loads: int
    bytes_read: int  # of experts paged in, wherever from
    disk_bytes_read: int  # by the pager, as the kernel counts it
    read_mode: str  # "buffered" or "direct"
    read_mode_reason: str
    tiers: list[MemoryTier]  # slots, page cache, disk
    paging: Latency
    routing: Latency
    resident_experts: int
    resident_expert_bytes: int
    expert_budget_bytes: int
    slots: int
    pinned_experts: list[tuple[int, int]]  # (layer, expert), by `pin_experts`
    pinned_experts_absent: int  # of them: still to be loaded
    processes: list[int]  # that use the cache now
    pins_reclaimed: int  # that processes held when they died
    pager_pid: int
    pager_restarts: int
    warm_start_problem: str | None  # why nothing of earlier caches is known, or nothing will be of this one

    @property
    def hit_rate(self) -> float:
        accesses = self.expert_hits + self.expert_misses
        return self.expert_hits / accesses if accesses else 0.0


def cache_stats(
    counters: InstanceCounters,
    geometry: Geometry,
    user_pins: UserPins,
    *,
    resident: int,
    disk_bytes_read: int,
    read_mode: str,
    read_mode_reason: str,
    processes: list[int],
    pins_reclaimed: int,
    pager_pid: int,
    pager_restarts: int,
    warm_start_problem: str | None,
) -> ExpertCacheStats:
    """What the arena has counted, and what its owner knows besides."""
    counts, metrics = counters.counts(), counters.metrics.summary()
    return ExpertCacheStats(
        expert_hits=counts[Counter.DECODE_EXPERT_HITS],
        expert_misses=counts[Counter.DECODE_EXPERT_MISSES],
        prefill_expert_hits=counts[Counter.PREFILL_EXPERT_HITS],
        prefill_expert_misses=counts[Counter.PREFILL_EXPERT_MISSES],
        expert_wait_seconds=counts[Counter.EXPERT_WAIT_NANOSECONDS] / 1e9,
        urgent_page_ins=counts[Counter.URGENT_PAGE_INS],
        prefetch_page_ins=counts[Counter.PREFETCH_PAGE_INS],
        warm_page_ins=counts[Counter.WARM_PAGE_INS],
        prefetch_requests=counts[Counter.PREFETCH_REQUESTS],
        prefetch_hits=counts[Counter.PREFETCH_HITS],
        evictions=counts[Counter.EVICTIONS],
        failed_loads=counts[Counter.FAILED_LOADS],
        bytes_read=counts[Counter.BYTES_READ],
        disk_bytes_read=disk_bytes_read,
        read_mode=read_mode,
        read_mode_reason=read_mode_reason,
        tiers=measured_tiers(counters.metrics, counts, resident),
        paging=metrics.paging_latency,
        routing=metrics.routing_latency,
        resident_experts=resident,
        resident_expert_bytes=counters.resident_nbytes(geometry.num_slots),
        expert_budget_bytes=geometry.slots_nbytes,
        slots=geometry.num_slots,
        pinned_experts=user_pins.pinned(),
        pinned_experts_absent=user_pins.count_absent(),
        processes=processes,
        pins_reclaimed=pins_reclaimed,
        pager_pid=pager_pid,
        pager_restarts=pager_restarts,
        warm_start_problem=warm_start_problem,
    )
