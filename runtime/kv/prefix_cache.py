"""The prefix cache: published pages stay findable after their sequences are gone, until their room is needed."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from hotset.runtime.kv.events import CacheCleared, CacheEvent, PagesRemoved, PagesStored, page_keys
from hotset.runtime.kv.page_pool import PagePool
from hotset.runtime.kv.prefix_eviction import DEFAULT_PRIORITY, EvictionOrder
from hotset.runtime.kv.prefix_tree import PrefixNode, PrefixTree
from hotset.runtime.kv.windowed_pages import WindowedPages

TokenIds = bytes | Sequence[int] | npt.NDArray[np.integer]
"""Token ids; bytes are packed int32 already. Packing a list costs far more than looking it up."""


def pack_tokens(tokens: TokenIds) -> bytes:
    """Token ids as packed int32, 4 bytes each in native order."""
    if isinstance(tokens, bytes):
        if len(tokens) % 4:
            raise ValueError(f"packed token ids take 4 bytes each, got {len(tokens)} bytes")
        return tokens
    try:
        if isinstance(tokens, np.ndarray):
            return tokens.astype(np.int32, casting="same_kind", copy=False).tobytes()
        return array("i", tokens).tobytes()
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the token ids are {tokens!r}, expected integers of 32 bits: {error}") from None


class PrefixCache:
    """Publishes full pages in a `PrefixTree` and evicts idle ones in `EvictionOrder`.

    The tree holds the pages of the first group of layers, `windowed` those of the others. Of them the one that was used
    longest ago goes first when it was used before the tree's candidate.

    A sequence that uses a published page uses all pages in front of it, so idle pages are found below pages in use and
    never above; only pins of single pages and sliding windows make exceptions, see `_evict_below_idle`.

    Two sequences may compute the same tokens at the same time. The tree keeps the page published first, the other is
    its duplicate: unpublished, and it takes the place in the tree when the first loses its last reference.

    Args:
        pool: the pages.
        page_nbytes: bytes of one page's token ids.
        clock: seconds, for priorities with a time limit.
        events: whether to collect `take_events`.
        num_groups: of layers.
    """

    def __init__(
        self, pool: PagePool, page_nbytes: int, clock: Callable[[], float], events: bool, num_groups: int = 1
    ) -> None:
        self._pool = pool
        self.windowed = WindowedPages(pool, num_groups)
        self._has_windowed = num_groups > 1
        self._tree = PrefixTree(page_nbytes, pool.published)
        self._order = EvictionOrder(pool.references, clock)
        self._original: dict[int, int] = {}  # duplicate page -> published page with the same tokens
        self._duplicates: dict[int, list[int]] = {}  # the reverse
        self._keys: dict[int, bytes] | None = {} if events else None
        self._events: list[CacheEvent] = []
        self.evictions = 0
        self.find = self._tree.find
        pool.evict = self.evict

    def pages_to(self, node: PrefixNode | None) -> list[int]:
        return self._tree.pages_to(node)

    def publish(
        self,
        salt: Hashable,
        previous: int,
        tokens: bytes,
        pages: list[int],
        priority: int = DEFAULT_PRIORITY,
        retention: float | None = None,
    ) -> bool:
        """Makes full pages findable behind the page `previous` (0: at the start).

        Returns False if `previous` is not published any more: nothing can be found behind it.
        """
        previous = self._original.get(previous, previous)
        if previous and self._pool.published[previous] is None:
            return False
        node, duplicates = self._tree.insert(salt, previous, tokens, pages, priority)
        node.last_use = self._tree.tick
        if node.priority == priority:
            node.retention = retention
        if self._keys is not None and len(duplicates) < len(pages):
            self._note_stored(salt, duplicates[-1][1] if duplicates else previous, tokens, pages, duplicates)
        for page, original in duplicates:
            if page in self._original:  # a fork has offered the same page before
                continue
            self._original[page] = original
            self._duplicates.setdefault(original, []).append(page)
            if not self._pool.references[original]:
                self._inherit(original)
        return True

    def raise_priority(self, node: PrefixNode | None, priority: int, retention: float | None) -> None:
        """Prefixes of a request are worth at least as much as the request."""
        while node is not None and node.pages:
            if node.priority < priority:
                node.priority, node.retention = priority, retention
            node = node.parent

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each page, given in the order of the tokens."""
        deepest = self._pool.release(pages)
        if self._original:
            self._settle_duplicates(pages)
        node = self._pool.published[deepest]
        if node is not None:
            self._tree.tick = node.last_use = self._tree.tick + 1
            if node.priority != DEFAULT_PRIORITY:
                self._order.retain(node)
            self._order.add(node)

    def release_windowed(self, pages: Sequence[int]) -> None:
        """One reference less to each page of another group than the first."""
        self.windowed.release(pages, self._tree.tick)

    def originals(self, pages: Sequence[int]) -> list[int]:
        """The pages that the tree has for the tokens of published ones: themselves but for duplicates."""
        return [self._original.get(page, page) for page in pages]

    def is_duplicate(self, page: int) -> bool:
        return page in self._original

    def evict(self) -> int:
        """Takes the idle page that is worth least out of the tree; there must be one."""
        node = self._order.first()
        if (
            self._has_windowed
            and (tick := self.windowed.oldest()) is not None
            and (node is None or tick < node.last_use)
        ):
            if node is not None:
                self._order.add(node)
            self.evictions += 1
            return self.windowed.evict()
        if node is None:
            return self._evict_below_idle()
        page = self._tree.remove_last_page(node)
        if self._has_windowed:
            self.evictions += self.windowed.drop(page)
        if not node.pages:
            parent = node.parent
            if parent is not None and not parent.children:
                self._order.add(parent)
        self._pool.idle -= 1
        self.evictions += 1
        if self._keys is not None:
            self._note_removed(page)
        return page

    def move(self, moves: Mapping[int, int]) -> None:
        """The rows of pages are in other pages now: page -> new page, all at once."""
        self._tree.move(moves)
        self.windowed.move(moves)
        if self._keys is not None:
            self._keys = {moves.get(page, page): key for page, key in self._keys.items()}
        if self._original:
            self._original = {
                moves.get(page, page): moves.get(original, original) for page, original in self._original.items()
            }
            self._duplicates = {
                moves.get(original, original): [moves.get(page, page) for page in pages]
                for original, pages in self._duplicates.items()
            }

    def clear(self) -> None:
        """Forgets every published page. No sequence may use any."""
        published = [page for page in range(1, self._pool.num_pages + 1) if self._pool.published[page]]
        self._tree.clear()
        self.windowed.clear()
        self._order.clear()
        self._pool.free += published
        self._pool.idle = 0
        if self._keys is not None:
            self._keys.clear()
            self._events.append(CacheCleared())

    def take_events(self) -> list[CacheEvent]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def runs(self) -> list[list[int]]:
        """The runs of pages in the tree."""
        return [node.pages for node in self._tree.nodes()]

    def problem(self) -> str | None:
        """What contradicts the invariants of the tree, in one sentence; None if nothing does."""
        size, references = self._tree.page_nbytes, self._pool.references
        held = 0
        for node in self._tree.nodes():
            held += len(node.pages)
            nbytes = len(node.key) + len(node.tail)
            if not node.pages or nbytes != len(node.pages) * size:
                return f"a node has {len(node.pages)} pages and {nbytes} bytes of tokens"
            if node.parent is None or node.parent.children.get(node.key) is not node:
                return f"the node of page {node.pages[0]} is not its parent's child"
            if node.start != node.parent.start + len(node.parent.pages):
                return f"the node of page {node.pages[0]} starts at {node.start}"
            for page in node.pages:
                if self._pool.published[page] is not node:
                    return f"page {page} does not know its node"
                if not references[page] and self._duplicates.get(page):
                    return f"the idle page {page} keeps the place of a duplicate in use"
            if not node.children and not references[node.pages[-1]] and node.queued is None:
                return f"the idle page {node.pages[-1]} cannot be evicted"
        if held + len(self.windowed) != sum(node is not None for node in self._pool.published):
            return f"{held} pages in the tree and {len(self.windowed)} beside it, and others are marked as published"
        for duplicate, original in self._original.items():
            if not references[duplicate] or duplicate not in self._duplicates.get(original, ()):
                return f"page {duplicate} is no duplicate of {original}"
        return self.windowed.problem()

    def _settle_duplicates(self, pages: Sequence[int]) -> None:
        """After a release: forgets duplicates that are gone, and lets live ones inherit from idle pages."""
        for page in pages:
            if self._pool.references[page]:
                continue
            original = self._original.pop(page, None)
            if original is not None:
                self._duplicates[original].remove(page)
                if not self._duplicates[original]:
                    del self._duplicates[original]
            elif page in self._duplicates:
                self._inherit(page)

    def _inherit(self, page: int) -> None:
        """The first duplicate of an idle page takes its place in the tree, and the idle page is free."""
        heir, *others = self._duplicates.pop(page)
        del self._original[heir]
        if others:
            self._duplicates[heir] = others
            self._original.update(dict.fromkeys(others, heir))
        self._tree.move({page: heir})
        self.windowed.inherit(page, heir)
        if self._keys is not None:
            self._keys[heir] = self._keys.pop(page)
        self._pool.free.append(page)
        self._pool.idle -= 1

    def _evict_below_idle(self) -> int:
        """Every idle page has a page in use behind it. Those can only be found through it, so with the idle page all
        that is behind it leaves the tree.
        """
        pool = self._pool
        idle = next(
            page
            for page in range(1, pool.num_pages + 1)
            if pool.published[page] is not None and not pool.references[page]
        )
        node = pool.published[idle]
        for page in self._tree.remove_from(idle):
            if self._keys is not None:
                self._note_removed(page)
            self._drop_duplicates_of(page)
            self.evictions += self.windowed.drop(page)
            if not pool.references[page]:
                pool.free.append(page)
                pool.idle -= 1
                self.evictions += 1
        if node is not None and node.parent is not None:
            self._order.add(node.parent)
        return pool.free.pop()

    def _drop_duplicates_of(self, page: int) -> None:
        for duplicate in self._duplicates.pop(page, ()):
            del self._original[duplicate]

    def _note_stored(
        self, salt: Hashable, parent: int, tokens: bytes, pages: list[int], duplicates: list[tuple[int, int]]
    ) -> None:
        keys = self._keys
        if keys is None:
            return
        new = len(duplicates)
        size = self._tree.page_nbytes
        parent_key = keys.get(parent)
        new_keys = page_keys(tokens[new * size :], size, salt, parent_key)
        keys.update(zip(pages[new:], new_keys, strict=True))
        self._events.append(PagesStored(new_keys, parent_key, salt))

    def _note_removed(self, page: int) -> None:
        if self._keys is not None:
            self._events.append(PagesRemoved([self._keys.pop(page)]))
