"""The pages of the KV cache as a resource: which are free, and how often each is referenced and was handed out."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from hotset.runtime.kv.errors import OutOfPages

if TYPE_CHECKING:
    from hotset.runtime.kv.prefix_tree import PrefixNode

NO_PAGE = 0
"""Page numbers start at 1; 0 in a block table says that the page was given back (sliding window)."""

_NEVER_ZERO = 1 << 62


class PagePool:
    """Pages 1 ... `num_pages`, each in exactly one of three states:

    * free: on the stack `free`; no reference, not published;
    * idle: published in the prefix tree and without a reference; found by lookups, evicted when `free` is empty;
    * in use: at least one reference. `references[page]` = block tables that name the page + pins.

    So `len(free) + idle + pages in use = num_pages`. A page may be written only by the one sequence that names it, and
    only while it is unpublished.

    Attributes (for reading; the cache and its prefix tree are the only writers):
        free: stack, the page handed out next last.
        references: per page.
        published: per page the tree node that holds it, None if it is not in the tree.
        generations: per page how often it was handed out; a reader that kept (page, generation) learns of reuse.
        idle: number of idle pages.
        pins: per pinned page how often.
    """

    __slots__ = ("evict", "free", "generations", "idle", "num_pages", "pins", "published", "references")

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.free = list(range(num_pages, 0, -1))
        self.references = [0] * (num_pages + 1)
        self.references[NO_PAGE] = _NEVER_ZERO  # given-back entries of block tables need no special case
        self.published: list[PrefixNode | None] = [None] * (num_pages + 1)
        self.generations = [0] * (num_pages + 1)
        self.idle = 0
        self.pins: dict[int, int] = {}
        self.evict: Callable[[], int] | None = None  # takes one idle page out of the prefix tree

    @property
    def available(self) -> int:
        """Pages that an allocation can have: free ones, and idle ones by eviction."""
        return len(self.free) + self.idle

    def take(self, count: int) -> list[int]:
        """`count` pages with one reference each: free ones first, then idle ones in the order of eviction.

        Raises:
            OutOfPages: fewer are available; nothing is evicted then.
        """
        free = self.free
        if count <= len(free):
            if not count:
                return []
            pages = free[: -count - 1 : -1]
            del free[-count:]
        else:
            if count > len(free) + self.idle:
                raise OutOfPages(count, len(free) + self.idle)
            pages = free[::-1]
            free.clear()
            evict = self.evict
            while len(pages) < count:
                pages.append(free.pop() if free or evict is None else evict())
        references, generations = self.references, self.generations
        for page in pages:
            references[page] = 1
            generations[page] += 1
        return pages

    def take_one(self) -> int:
        """`take(1)` without a list."""
        free = self.free
        if free:
            page = free.pop()
        elif self.idle and self.evict:
            page = self.evict()
        else:
            raise OutOfPages(1, 0)
        self.references[page] = 1
        self.generations[page] += 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page."""
        references = self.references
        woken = 0
        for page in pages:
            if not references[page]:
                woken += 1
            references[page] += 1
        self.idle -= woken

    def share_used(self, pages: Iterable[int]) -> None:
        """`share` for pages that are in use, none of which has to be woken."""
        references = self.references
        for page in pages:
            references[page] += 1

    def release(self, pages: Sequence[int]) -> int:
        """One reference less to each page. The last one of an unpublished page frees it, of a published one makes it
        idle.

        Pages of one sequence are given in the order of its tokens: its tail is then reused before its head.

        Returns:
            The last of the pages that became idle, 0 if none did.
        """
        references, published, free = self.references, self.published, self.free
        idled = last = 0
        for page in pages:
            count = references[page] - 1
            references[page] = count
            if not count:
                if published[page] is None:
                    free.append(page)
                else:
                    idled += 1
                    last = page
        self.idle += idled
        return last

    def pin(self, pages: Sequence[int]) -> None:
        """One reference more to each page, from outside the block tables.

        Raises:
            ValueError: a page that holds nothing.
        """
        for page in pages:
            if not 1 <= page <= self.num_pages or not (self.references[page] or self.published[page]):
                raise ValueError(f"page {page} holds nothing that could be pinned")
        self.share(pages)
        for page in pages:
            self.pins[page] = self.pins.get(page, 0) + 1

    def unpin(self, pages: Sequence[int]) -> None:
        """Takes the pins away; the references that they were stay and have to be released.

        Raises:
            ValueError: a page is not pinned that often.
        """
        for page, count in Counter(pages).items():
            if self.pins.get(page, 0) < count:
                raise ValueError(f"page {page} is not pinned that often")
        for page in pages:
            self.pins[page] -= 1
            if not self.pins[page]:
                del self.pins[page]

    def is_writable(self, page: int) -> bool:
        """Whether one block table names the page and it is not published."""
        return self.references[page] - self.pins.get(page, 0) == 1 and self.published[page] is None

    def move(self, moves: Mapping[int, int]) -> None:
        """References go with the rows, source -> destination, in the order of the copies. The free stack is put in
        ascending order. What `published` says is moved by the prefix tree.
        """
        free = bytearray(self.num_pages + 1)
        for page in self.free:
            free[page] = 1
        references = self.references
        for source, destination in moves.items():
            references[destination], references[source] = references[source], 0
            self.generations[destination] += 1
            free[source], free[destination] = 1, 0
        self.free = list(itertools.compress(range(self.num_pages, 0, -1), free[:0:-1]))

    def problem(self, tables: Iterable[Iterable[int]]) -> str | None:
        """What contradicts the three states, in one sentence; None if nothing does."""
        named = Counter(itertools.chain.from_iterable(tables))
        named.update(self.pins)
        free = set(self.free)
        if len(free) != len(self.free):
            return "a page is in the free list twice"
        idle = 0
        for page in range(1, self.num_pages + 1):
            if self.references[page] != named[page]:
                return f"page {page} counts {self.references[page]} references and has {named[page]}"
            published = self.published[page] is not None
            idle += published and not named[page]
            if (page in free) != (not named[page] and not published):
                return f"page {page} is {'' if page in free else 'not '}in the free list"
        return None if idle == self.idle else f"{self.idle} pages are counted as idle and {idle} are"
