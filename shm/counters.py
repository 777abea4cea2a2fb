"""What is counted. One row per process in the arena, written by that process alone; readers add the rows up."""

from __future__ import annotations

import enum

from hotset.shm.layout import PrefetchSource


@enum.unique
class Counter(enum.IntEnum):
    """Index in a process's row. The C core writes the first group itself: shm/core/counters.h has the same numbers."""

    # the router
    ROUTING_DECISIONS = 0  # tokens routed, per layer
    CACHE_HITS = 1  # selections that the residency mask had
    CACHE_MISSES = 2
    NAN_LOGITS = 3
    ROWS_WITHOUT_FINITE_LOGIT = 4
    SELECTIONS_CHANGED = 5  # selected experts that are not in the row's true top-k
    LOST_MASS_Q32 = 6  # routed probability mass given up for residency, in units of 2**-32
    ROUTING_NANOSECONDS = 7
    ROUTING_MAX_NANOSECONDS = 8
    # the serving loop: a hit is counted per distinct expert per layer step, when its pin succeeds at once
    DECODE_EXPERT_HITS = 16
    DECODE_EXPERT_MISSES = 17
    PREFILL_EXPERT_HITS = 18
    PREFILL_EXPERT_MISSES = 19
    PREFETCH_HITS = 20
    PREFETCH_REQUESTS = 21
    PREFETCH_DROPPED = 22
    DECODE_TOKENS = 23
    PREFILL_TOKENS = 24
    STEPS = 25
    EXPERT_WAIT_NANOSECONDS = 26
    TRIAL_NANOSECONDS_WITH = 27  # of decode steps that prefetched, and of as many that did not, in turn
    TRIAL_NANOSECONDS_WITHOUT = 28
    COMPUTING = 29  # not a sum: 1 while the worker has something to compute (workers/core_share.py)
    EXPERTS_LEFT_OUT = 30  # of the hits, those that stood in for what little is missing, and were not computed
    # the pager
    URGENT_PAGE_INS = 32
    PREFETCH_PAGE_INS = 33
    PAGE_OUTS = 34
    EVICTIONS = 35
    EVICTIONS_REFUSED = 36  # the chosen victim was pinned after all
    BYTES_READ = 37
    PAGING_NANOSECONDS = 38
    PAGING_MAX_NANOSECONDS = 39
    FAILED_LOADS = 40
    WARM_PAGE_INS = 41  # nobody asked for them: an instance begins with what the last one had
    PAGE_CACHE_PAGE_INS = 42  # of all page-ins, those that the page cache had wholly
    DISK_PAGE_INS = 43
    LEARNED_REFUSED = 44  # what td eviction learned earlier was of no use: damaged, or of another shape
    # from PREFETCH_OF_SOURCE on: see `prefetch_counter`


class PrefetchCount(enum.IntEnum):
    """What is counted of each source of prefetches."""

    REQUESTS = 0  # by the worker that asked
    PAGE_INS = 1  # by the pager, also if somebody came to wait for it meanwhile
    HITS = 2  # by the worker that was the first to use one of those, before it was evicted
    LATE_HITS = 3  # likewise, but somebody waited for the rest of the read; by the pager if it knew of that


PREFETCH_OF_SOURCE = 64


def prefetch_counter(source: PrefetchSource, count: PrefetchCount) -> int:
    """Index in a process's row."""
    return PREFETCH_OF_SOURCE + len(PrefetchCount) * source + count


class Histogram(enum.IntEnum):
    """Which of a process's histograms."""

    ROUTING = 0
    PAGING = 1  # urgent page-ins, and again by where the bytes came from:
    PAGE_CACHE = 2
    DISK = 3
    SLOT = 4  # finding a resident expert
