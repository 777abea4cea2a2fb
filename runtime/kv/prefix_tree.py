"""The prefix tree: token ids to the pages that hold their rows.

Path-compressed over pages: a node is a run of pages that was only ever entered at its first one. Tokens are compared
as the packed bytes they are kept in (int32), so a hit is exact: no hash decides it.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Iterator, Mapping


class PrefixNode:
    """A run of consecutive published pages.

    Invariants: `len(key) + len(tail) == len(pages) * page_nbytes`; siblings differ in their first page; only a root has
    no pages.

    Attributes:
        start: pages in front of it, up to the root.
        key: packed int32 ids of its first page, by which its parent finds it.
        tail: those of the other pages, in place so that the last page goes and the next one comes at constant cost.
        last_use: tick of the last lookup or release that ended in this node. Lookups that passed through to a child
            are not noted here: a node is never evicted before its children, and inherits their tick.
        priority, retention, priority_until: see `EvictionOrder`.
        queued: this node's valid entry in the eviction order, None while it has none.
        salt: of the tree that the node belongs to.
    """

    __slots__ = (
        "children",
        "key",
        "last_use",
        "pages",
        "parent",
        "priority",
        "priority_until",
        "queued",
        "retention",
        "salt",
        "start",
        "tail",
    )

    def __init__(
        self,
        salt: Hashable,
        parent: PrefixNode | None,
        start: int,
        key: bytes,
        tail: bytearray,
        pages: list[int],
        priority: int,
    ) -> None:
        self.salt = salt
        self.parent = parent
        self.start = start
        self.key = key
        self.tail = tail
        self.pages = pages
        self.children: dict[bytes, PrefixNode] = {}
        self.last_use = 0
        self.priority = priority
        self.retention: float | None = None
        self.priority_until = 0.0
        self.queued: QueueEntry | None = None


QueueEntry = tuple[int, int, int, PrefixNode]
"""Priority, last use, a serial number that makes entries comparable, and the node."""


class PrefixTree:
    """One tree per salt.

    Args:
        page_nbytes: bytes of one page's token ids (4 per token).
        published: per page number the node that holds it; the tree keeps it up to date.

    Attributes:
        tick: counts uses.
    """

    def __init__(self, page_nbytes: int, published: list[PrefixNode | None]) -> None:
        self.page_nbytes = page_nbytes
        self._published = published
        self.tick = 0
        self._iterate_pages = struct.Struct(f"{page_nbytes}s").iter_unpack
        self._roots: dict[Hashable, PrefixNode] = {}

    def find(self, tokens: bytes, salt: Hashable) -> PrefixNode | None:
        """The node that ends the longest prefix of `tokens` in the tree; None without a hit. Counts as a use.

        The prefix ends where the node ends: a node that agrees only in part is split.
        """
        size = self.page_nbytes
        try:
            root = self._roots.get(salt)
        except TypeError:
            raise ValueError(f"salt is {salt!r}, expected something that can be hashed") from None
        node = root.children.get(tokens[:size]) if root is not None else None
        if node is None:
            return None
        end = len(tokens)
        position = size
        try:
            while True:
                if node.tail:
                    if not tokens.startswith(node.tail, position):
                        node = self.split(node, 1 + self._common_pages(tokens, position, node.tail))
                        break
                    position += len(node.tail)
                if position >= end:
                    break
                for (key,) in self._iterate_pages(memoryview(tokens)[position : end - end % size]):
                    node = node.children[key]
                    if node.tail:  # else the children's dictionary has compared the whole node
                        position = (node.start + 1) * size
                        break
                else:
                    break
        except KeyError:
            pass  # nothing goes on like `tokens` does
        self.tick = node.last_use = self.tick + 1
        return node

    def pages_to(self, node: PrefixNode | None) -> list[int]:
        """All pages from the root to the end of `node`, in the order of the tokens."""
        runs: list[list[int]] = []
        while node is not None:
            runs.append(node.pages)
            node = node.parent
        return [page for run in reversed(runs) for page in run]

    def insert(
        self, salt: Hashable, previous: int, tokens: bytes, pages: list[int], priority: int
    ) -> tuple[PrefixNode, list[tuple[int, int]]]:
        """Publishes `pages`, which hold `tokens` and follow the published page `previous` (0: at the start).

        Where the tree has a page for the same tokens already, it keeps its own.

        Returns:
            The node that holds the last page, and the pairs (page, the page that the tree has instead).
        """
        size = self.page_nbytes
        node, offset = self._position_after(salt, previous)
        duplicates: list[tuple[int, int]] = []
        for index, page in enumerate(pages):
            key = tokens[index * size : (index + 1) * size]
            if offset == len(node.pages):
                child = node.children.get(key)
                if child is None:
                    break
                node, offset = child, 0
            elif bytes(node.tail[(offset - 1) * size : offset * size]) != key:
                break
            if node.pages[offset] != page:
                duplicates.append((page, node.pages[offset]))
            offset += 1
        else:
            return node, duplicates
        if offset < len(node.pages):
            node = self.split(node, offset)
        return self._add_below(node, tokens[index * size :], pages[index:], priority), duplicates

    def split(self, node: PrefixNode, count: int) -> PrefixNode:
        """Cuts a node behind its first `count` pages and returns the part that has them; no-op for all pages."""
        if count == len(node.pages):
            return node
        kept, key_end = (count - 1) * self.page_nbytes, count * self.page_nbytes
        parent = node.parent
        upper = PrefixNode(node.salt, parent, node.start, node.key, node.tail[:kept], node.pages[:count], node.priority)
        upper.last_use, upper.retention = node.last_use, node.retention
        upper.priority_until = node.priority_until
        if parent is not None:
            parent.children[upper.key] = upper
        for page in upper.pages:
            self._published[page] = upper
        node.key = bytes(node.tail[kept:key_end])
        del node.tail[:key_end]
        del node.pages[:count]
        node.start += count
        node.parent = upper
        upper.children[node.key] = node
        return upper

    def remove_last_page(self, node: PrefixNode) -> int:
        """Takes the last page of a leaf out of the tree; a leaf without pages goes too."""
        page = node.pages.pop()
        self._published[page] = None
        if node.pages:
            del node.tail[-self.page_nbytes :]
        else:
            self._unlink(node)
        return page

    def remove_from(self, page: int) -> list[int]:
        """Takes a page and everything behind it out of the tree, and returns those pages."""
        node = self._published[page]
        if node is None:
            return []
        count = node.pages.index(page)
        if count:
            self.split(node, count)
        self._unlink(node)
        removed: list[int] = []
        stack = [node]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            removed += node.pages
            for gone in node.pages:
                self._published[gone] = None
            node.pages, node.queued = [], None
        return removed

    def move(self, moves: Mapping[int, int]) -> None:
        """The rows of pages are in other pages now: page -> new page, all at once."""
        published = self._published
        holders = {page: node for page in moves if (node := published[page]) is not None}
        for page in holders:
            published[page] = None
        for page, node in holders.items():
            published[moves[page]] = node
        for node in {id(node): node for node in holders.values()}.values():
            node.pages[:] = [moves.get(page, page) for page in node.pages]

    def clear(self) -> None:
        for node in self.nodes():
            for page in node.pages:
                self._published[page] = None
        self._roots.clear()

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes but the roots, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node

    def _common_pages(self, tokens: bytes, position: int, run: bytearray) -> int:
        """Leading pages of `run` that `tokens` has at `position`."""
        size = self.page_nbytes
        agree, limit = 0, min(len(run), len(tokens) - position) // size
        while agree < limit:
            middle = (agree + limit + 1) // 2
            if tokens.startswith(run[: middle * size], position):
                agree = middle
            else:
                limit = middle - 1
        return agree

    def _position_after(self, salt: Hashable, previous: int) -> tuple[PrefixNode, int]:
        """The node that holds `previous`, and how many of its pages there are up to it."""
        node = self._published[previous] if previous else None
        if node is not None:
            last = len(node.pages)
            return node, last if node.pages[-1] == previous else node.pages.index(previous) + 1
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = PrefixNode(salt, None, 0, b"", bytearray(), [], 0)
        return root, 0

    def _add_below(self, node: PrefixNode, tokens: bytes, pages: list[int], priority: int) -> PrefixNode:
        """Appends a run behind a whole node: to the node itself if it is a leaf of the same priority."""
        if node.parent is not None and not node.children and node.priority == priority:
            node.tail += tokens
            node.pages += pages
        else:
            start = node.start + len(node.pages)
            key, tail = tokens[: self.page_nbytes], bytearray(tokens[self.page_nbytes :])
            node.children[key] = child = PrefixNode(node.salt, node, start, key, tail, pages, priority)
            node = child
        for page in pages:
            self._published[page] = node
        return node

    def _unlink(self, node: PrefixNode) -> None:
        """Takes a node out of its parent; an empty root goes too."""
        parent = node.parent
        if parent is None:
            return
        del parent.children[node.key]
        if parent.last_use < node.last_use:
            parent.last_use = node.last_use
        if parent.parent is None and not parent.children:
            del self._roots[parent.salt]
