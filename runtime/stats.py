"""Numbers about a running instance: the counters of all processes added up, and what is in memory now."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.memory_tiers import MemoryTier, measured_tiers
from hotset.runtime.metrics import Latency, MoeMetrics
from hotset.runtime.plan import InstancePlan
from hotset.runtime.prefetch import SOURCES
from hotset.runtime.routing_preference import RoutingPreference
from hotset.runtime.scheduler import Scheduler
from hotset.runtime.user_pins import UserPins
from hotset.shm.counters import Counter, PrefetchCount, prefetch_counter
from hotset.shm.layout import COUNTERS_PER_PROCESS, Section, SlotState
from hotset.shm.segment import Segment


class Regret(msgspec.Struct, frozen=True):
    """What other policies would have hit on the latest decode steps with exact routing, with as many slots, from an
    empty cache: whether it is the memory, the policy or the routing that is worth changing.

    Attributes:
        demands: steps of a layer that were replayed.
        lru_hit_rate, min_hit_rate: of least recently used, and of Belady's MIN, which knows the future.
        crowd: r, the distinct experts per step of a layer divided by the slots per layer.
    """

    demands: int
    lru_hit_rate: float
    min_hit_rate: float
    crowd: float


class PrefetchStats(msgspec.Struct, frozen=True):
    """What one source of prefetches was worth.

    Soon after `reset_stats`, page-ins are also of what was asked for before it: there may be more than requests.

    Attributes:
        requests: experts that it asked for.
        page_ins: of those, read.
        hits: of these, used at once before they were evicted.
        late_hits: of these, used by somebody who had to wait for the rest of the read.
        misses: of all decode steps, had nothing been prefetched.
    """

    source: str
    requests: int
    page_ins: int
    hits: int
    late_hits: int
    misses: int

    @property
    def precision(self) -> float:
        """Of what was read, what was used."""
        return _ratio(self.hits + self.late_hits, self.page_ins)

    @property
    def recall(self) -> float:
        """Of the misses there would have been, those that had been asked for in time, or almost."""
        return _ratio(self.hits + self.late_hits, self.misses)


class BackendStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot. Counts are since the start, or since the last `reset_stats`.

    Hits and misses are counted per distinct expert per layer step, when the pin succeeds at once. `experts_left_out` of
    the hits were in memory and not even computed (`substitute`).
    """

    decode_expert_hits: int
    decode_expert_misses: int
    prefill_expert_hits: int
    prefill_expert_misses: int
    experts_left_out: int
    expert_wait_seconds: float  # that workers waited for missing experts, added up
    decode_tokens: int
    prefill_tokens: int
    steps: int
    urgent_page_ins: int
    prefetch_page_ins: int
    warm_page_ins: int  # of what earlier instances had, before anybody asked for it
    learned_refused: int  # pagers that could not use what td eviction learned earlier; why is in warm_start_problem
    prefetch_hits: int
    prefetch: list[PrefetchStats]  # of the sources that asked for something
    prefetch_step_time: float | None  # of steps that prefetch, as a multiple of those that do not; if "auto" has tried
    evictions: int
    preference: RoutingPreference
    bytes_read: int  # of experts paged in, wherever from
    disk_bytes_read: int  # by the pager, as the kernel counts it
    read_mode: str  # "buffered" or "direct"
    read_mode_reason: str
    tiers: list[MemoryTier]  # slots, page cache, disk
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
    prefix_cache_hit_rate: float  # of recent prompts' tokens
    requests_running: int
    requests_waiting: int
    preemptions: int
    migrations: int
    worker_restarts: int
    pager_restarts: int
    pins_reclaimed: int
    workers: int
    pinned_experts: list[tuple[int, int]]  # (layer, expert), by the user
    pinned_experts_absent: int  # of them: still to be loaded
    warm_start_problem: str | None  # why nothing of earlier instances is known, or nothing will be of this one
    regret: Regret | None  # None until a first replay is done, some tenths of a second after the first decode step

    @property
    def decode_hit_rate(self) -> float:
        return _ratio(self.decode_expert_hits, self.decode_expert_hits + self.decode_expert_misses)

    @property
    def prefill_hit_rate(self) -> float:
        return _ratio(self.prefill_expert_hits, self.prefill_expert_hits + self.prefill_expert_misses)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class InstanceCounters:
    """What the processes of an instance have counted since the last reset, added up.

    Attributes:
        metrics: of routing and paging, since the same reset.
    """

    def __init__(self, segment: Segment) -> None:
        self._arena = segment.arena
        self._slot_info = segment.view(Section.SLOT_INFO)[:, 0]
        self.metrics = MoeMetrics(segment)
        self._baseline = np.zeros(COUNTERS_PER_PROCESS, np.uint64)

    def reset(self) -> None:
        """A baseline is kept here; nobody's row is ever written by a reader.

        What was prefetched until now loses its mark: else it would be used after it was read and counted before.
        """
        self._baseline = self._totals()
        self.metrics.reset()
        for expert in self._arena.resident_experts():
            self._arena.take_prefetched(expert)

    def counts(self) -> dict[Counter, int]:
        totals = self._totals() - self._baseline
        return {counter: int(totals[counter]) for counter in Counter}

    def stats(
        self,
        plan: InstancePlan,
        scheduler: Scheduler,
        *,
        worker_restarts: int,
        pager_restarts: int,
        pins_reclaimed: int,
        user_pins: UserPins,
        disk_bytes_read: int,
        read_mode: str,
        read_mode_reason: str,
        warm_start_problem: str | None,
        regret: Regret | None,
    ) -> BackendStats:
        """The snapshot that a user gets: what the arena has counted, and what the coordinator knows besides."""
        counts, routing, cache = self.counts(), self.metrics.summary(), scheduler.cache
        without = counts[Counter.TRIAL_NANOSECONDS_WITHOUT]
        return BackendStats(
            decode_expert_hits=counts[Counter.DECODE_EXPERT_HITS],
            decode_expert_misses=counts[Counter.DECODE_EXPERT_MISSES],
            prefill_expert_hits=counts[Counter.PREFILL_EXPERT_HITS],
            prefill_expert_misses=counts[Counter.PREFILL_EXPERT_MISSES],
            experts_left_out=counts[Counter.EXPERTS_LEFT_OUT],
            expert_wait_seconds=counts[Counter.EXPERT_WAIT_NANOSECONDS] / 1e9,
            decode_tokens=counts[Counter.DECODE_TOKENS],
            prefill_tokens=counts[Counter.PREFILL_TOKENS],
            steps=counts[Counter.STEPS],
            urgent_page_ins=counts[Counter.URGENT_PAGE_INS],
            prefetch_page_ins=counts[Counter.PREFETCH_PAGE_INS],
            warm_page_ins=counts[Counter.WARM_PAGE_INS],
            learned_refused=counts[Counter.LEARNED_REFUSED],
            prefetch_hits=counts[Counter.PREFETCH_HITS],
            prefetch=self._prefetch(counts),
            prefetch_step_time=counts[Counter.TRIAL_NANOSECONDS_WITH] / without if without else None,
            evictions=counts[Counter.EVICTIONS],
            bytes_read=counts[Counter.BYTES_READ],
            preference=plan.routing,
            disk_bytes_read=disk_bytes_read,
            read_mode=read_mode,
            read_mode_reason=read_mode_reason,
            tiers=measured_tiers(self.metrics, counts, len(self._arena.resident_experts())),
            routing_decisions=routing.routing_decisions,
            routing=routing.routing_latency,
            paging=routing.paging_latency,
            lost_mass=routing.lost_mass,
            resident_experts=len(self._arena.resident_experts()),
            resident_expert_bytes=self.resident_nbytes(plan.geometry.num_slots),
            expert_budget_bytes=plan.expert_budget_nbytes,
            kv_pages_used=cache.num_used_pages,
            kv_pages_peak=scheduler.peak_pages,
            kv_pages_total=cache.num_pages,
            prefix_cache_hit_rate=cache.hit_rate,
            requests_running=len(scheduler.running),
            requests_waiting=len(scheduler.waiting),
            preemptions=scheduler.preemptions,
            migrations=scheduler.migrations,
            worker_restarts=worker_restarts,
            pager_restarts=pager_restarts,
            pins_reclaimed=pins_reclaimed,
            workers=plan.num_workers,
            pinned_experts=user_pins.pinned(),
            pinned_experts_absent=user_pins.count_absent(),
            warm_start_problem=warm_start_problem,
            regret=regret,
        )

    def resident_nbytes(self, num_slots: int) -> int:
        resident = [slot for slot in range(num_slots) if self._arena.slot(slot)[2] == SlotState.RESIDENT]
        return int(self._slot_info["nbytes"][resident].sum())

    def _prefetch(self, counts: dict[Counter, int]) -> list[PrefetchStats]:
        totals = self._totals() - self._baseline
        misses = counts[Counter.DECODE_EXPERT_MISSES] + counts[Counter.PREFETCH_HITS]
        found: list[PrefetchStats] = []
        for name, source in SOURCES.items():
            requests, page_ins, hits, late = (int(totals[prefetch_counter(source, count)]) for count in PrefetchCount)
            if requests:
                found.append(PrefetchStats(name, requests, page_ins, hits, late, misses))
        return found

    def _totals(self) -> npt.NDArray[np.uint64]:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self._arena.counter_totals(totals)
        return totals
