"""Counters of the KV cache, and how well its pages are used."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec


class PagedCacheStats(msgspec.Struct):
    """Counts since the cache was made, and what is in use now."""

    sequences_allocated: int = 0
    sequences_freed: int = 0
    active_sequences: int = 0
    pages_allocated: int = 0
    pages_freed: int = 0
    pages_used: int = 0  # named by a block table or pinned
    pages_idle: int = 0  # kept only for the prefix cache
    pages_free: int = 0
    copy_on_write_copies: int = 0
    defragmentations: int = 0
    pages_moved: int = 0
    evictions: int = 0
    prefix_misses: int = 0  # lookups and admissions that found nothing
    evictable_tokens: int = 0  # in published pages that nobody uses
    protected_tokens: int = 0  # in published pages in use


class FragmentationStats(msgspec.Struct, frozen=True):
    """How scattered the used pages are and how much room in them is empty. Idle cached pages count as used."""

    holes: int  # runs of free pages that lie before some used page
    wasted_tokens: int  # room for tokens in used pages that no sequence fills
    ratio: float  # min(1, holes / used pages)
    largest_free_run: int  # pages
    mean_tokens_per_page: float


def fragmentation(
    free: Iterable[int],
    num_pages: int,
    block_size: int,
    tables: Iterable[tuple[Sequence[int], int]],
    published: Iterable[int],
) -> FragmentationStats:
    """Measured over all pages.

    Args:
        free: numbers of the free pages.
        num_pages: pages 1 ... num_pages exist.
        block_size: tokens per page.
        tables: (block table, length in tokens) of every sequence.
        published: pages that the prefix cache can find; they are full.
    """
    used = bytearray(b"\x01") * (num_pages + 1)
    for page in free:
        used[page] = 0
    occupied = bytes(used[1:])
    runs = occupied.rstrip(b"\x00").split(b"\x01")
    holes = sum(1 for run in runs if run)
    filled: dict[int, int] = {}
    for table, length in tables:
        for page in table:
            if page:
                filled[page] = max(filled.get(page, 0), min(max(length, 0), block_size))
            length -= block_size
    filled.update(dict.fromkeys(published, block_size))
    tokens, pages = sum(filled.values()), len(filled)
    return FragmentationStats(
        holes=holes,
        wasted_tokens=pages * block_size - tokens,
        ratio=min(1.0, holes / pages) if pages else 0.0,
        largest_free_run=max((len(run) for run in occupied.split(b"\x01")), default=0),
        mean_tokens_per_page=tokens / pages if pages else 0.0,
    )


def contiguity(table: Sequence[int]) -> float:
    """Share of neighbouring entries that are neighbouring pages: 1.0 is one ascending run."""
    pages = [page for page in table if page]
    if len(pages) < 2:
        return 1.0
    return sum(b == a + 1 for a, b in itertools.pairwise(pages)) / (len(pages) - 1)


class HitRateWindow:
    """Share of queried prompt tokens that the prefix cache had, over the most recent requests."""

    def __init__(self, max_requests: int = 1000) -> None:
        self._max_requests = max_requests
        self._updates: deque[tuple[int, int, int]] = deque()
        self._requests = self._queried = self._hit = 0

    def update(self, requests: int, queried: int, hit: int) -> None:
        """Adds `requests` requests that asked for `queried` tokens and found `hit`; the oldest updates leave the
        window.
        """
        if not requests:
            return
        self._updates.append((requests, queried, hit))
        self._add(requests, queried, hit)
        while len(self._updates) > 1 and self._requests > self._max_requests:
            oldest = self._updates.popleft()
            self._add(*(-number for number in oldest))

    def _add(self, requests: int, queried: int, hit: int) -> None:
        self._requests += requests
        self._queried += queried
        self._hit += hit

    @property
    def rate(self) -> float:
        """0.0 while nothing was queried."""
        return self._hit / self._queried if self._queried else 0.0
