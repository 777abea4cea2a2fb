"""In which order idle pages are evicted."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable

from hotset.runtime.kv.prefix_tree import PrefixNode, QueueEntry

DEFAULT_PRIORITY = 10


class EvictionOrder:
    """Leaves of the prefix tree whose last page is idle: lowest priority first, then least recently used.

    A leaf loses its pages from the end, so tails go before heads. A node is worth `priority` until `priority_until`
    and `DEFAULT_PRIORITY` after that; `retention` is the time in seconds that its priority holds after a release, None
    for ever.

    Leaves become idle in the order of their use, so most of them queue in a deque; the others (leaves that were
    parents, other priorities) in a heap. Both are lazy: a lookup only notes its tick in the node. An entry that turns
    out to be out of date when it comes up is queued again with the node's present key; one that is not its node's
    `queued` is dropped.
    """

    def __init__(self, references: list[int], clock: Callable[[], float]) -> None:
        self._references = references
        self._clock = clock
        self._serial = itertools.count()
        self._recent: deque[QueueEntry] = deque()
        self._heap: list[QueueEntry] = []
        self._expiring: list[tuple[float, int, PrefixNode]] = []

    def add(self, node: PrefixNode) -> None:
        """Takes note that the node may have become a leaf with an idle last page."""
        if node.queued is not None or node.children or not node.pages or self._references[node.pages[-1]]:
            return
        recent = self._recent
        node.queued = entry = (node.priority, node.last_use, next(self._serial), node)
        if entry[0] != DEFAULT_PRIORITY:
            heapq.heappush(self._heap, entry)
        elif not recent or recent[-1] < entry:
            recent.append(entry)
        elif entry[1] <= recent[0][1]:
            recent.appendleft(entry)
        else:
            heapq.heappush(self._heap, entry)

    def retain(self, node: PrefixNode) -> None:
        """Starts the time for which the priorities of a node and of those above it hold."""
        above: PrefixNode | None = node
        while above is not None and above.pages:
            if above.retention is not None:
                above.priority_until = self._clock() + above.retention
                heapq.heappush(self._expiring, (above.priority_until, next(self._serial), above))
            above = above.parent

    def first(self) -> PrefixNode | None:
        """The leaf whose last page goes next, and has to be taken out of it; None if no leaf ends in an idle page."""
        if self._expiring:
            self._expire()
        recent, heap = self._recent, self._heap
        while recent or heap:
            in_heap = not recent or (heap and heap[0] < recent[0])
            entry = heap[0] if in_heap else recent[0]
            node = entry[3]
            queued = entry is node.queued
            first = (
                queued
                and entry[1] == node.last_use
                and entry[0] == node.priority
                and not node.children
                and not self._references[node.pages[-1]]
            )
            if first and len(node.pages) > 1:
                return node
            if in_heap:
                heapq.heappop(heap)
            else:
                recent.popleft()
            if queued:
                node.queued = None
                if first:  # its only page goes
                    return node
                self.add(node)
        return None

    def clear(self) -> None:
        self._recent.clear()
        self._heap.clear()
        self._expiring.clear()

    def _expire(self) -> None:
        now = self._clock()
        while self._expiring and self._expiring[0][0] <= now:
            until, _, node = heapq.heappop(self._expiring)
            if node.retention is None or until != node.priority_until:
                continue  # used again since
            node.priority, node.retention = DEFAULT_PRIORITY, None
            node.queued = None  # it may have to move forward, which a lazy entry cannot
            self.add(node)
