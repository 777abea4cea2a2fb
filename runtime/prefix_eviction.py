"""In which order idle pages are evicted."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

from hotset.runtime.prefix_tree import PrefixNode

DEFAULT_PRIORITY = 10


class EvictionOrder:
    """Leaves of the prefix tree whose last page is idle: lowest priority first, then least recently used.

    A leaf loses its pages from the end, so tails go before heads. A node is worth `priority` until
    `priority_until` and `DEFAULT_PRIORITY` after that; `retention` is the time in seconds that its
    priority holds after a release, None for ever.

    The heap is lazy: a lookup only notes its tick in the node. An entry that turns out to be out of date
    when it comes up is put back with the node's present key; an entry that is not its node's `queued` is
    dropped.
    """

    def __init__(self, references: list[int], clock: Callable[[], float]) -> None:
        self._references = references
        self._clock = clock
        self._serial = itertools.count()
        self._heap: list[tuple[int, int, int, PrefixNode]] = []
        self._expiring: list[tuple[float, int, PrefixNode]] = []

    def add(self, node: PrefixNode) -> None:
        """Takes note that the node may have become a leaf with an idle last page."""
        if node.queued is None and node.pages and not node.children and not self._references[node.pages[-1]]:
            node.queued = (node.priority, node.last_use, next(self._serial), node)
            heapq.heappush(self._heap, node.queued)

    def retain(self, node: PrefixNode) -> None:
        """Starts the time for which the priorities of a node and of those above it hold."""
        above: PrefixNode | None = node
        while above is not None and above.pages:
            if above.retention is not None:
                above.priority_until = self._clock() + above.retention
                heapq.heappush(self._expiring, (above.priority_until, next(self._serial), above))
            above = above.parent

    def first(self) -> PrefixNode | None:
        """The leaf whose last page goes next; None if no leaf ends in an idle page."""
        if self._expiring:
            self._expire()
        heap, references = self._heap, self._references
        while heap:
            entry = heap[0]
            node = entry[3]
            if entry is not node.queued:
                heapq.heappop(heap)
            elif not node.pages or node.children or references[node.pages[-1]]:
                node.queued = None
                heapq.heappop(heap)
            elif entry[1] != node.last_use or entry[0] != node.priority:
                node.queued = (node.priority, node.last_use, next(self._serial), node)
                heapq.heapreplace(heap, node.queued)
            else:
                return node
        return None

    def clear(self) -> None:
        self._heap.clear()
        self._expiring.clear()

    def _expire(self) -> None:
        now = self._clock()
        while self._expiring and self._expiring[0][0] <= now:
            until, _, node = heapq.heappop(self._expiring)
            if node.retention is None or until != node.priority_until:
                continue  # used again since
            node.priority, node.retention = DEFAULT_PRIORITY, None
            if node.queued is not None:  # it may have to move forward, which a lazy entry cannot
                node.queued = None
                self.add(node)
