"""Published pages of the layers that see only a window of positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hotset.runtime.kv.page_pool import NO_PAGE, PagePool
from hotset.runtime.kv.prefix_tree import PrefixNode

PUBLISHED = PrefixNode((), None, 0, b"", bytearray(), [], 0)
"""Stands in `PagePool.published` for the node of a page that is kept here and not in the tree."""


class WindowedPages:
    """Per group behind the first, the published page for the tokens of a page in the prefix tree, which holds the rows
    of the first group: its owner.

    A prefix can be used without the pages before the window at its end, so each is evicted by itself. It leaves
    with its owner at the latest.

    Args:
        pool: the pages of all groups.
        num_groups: with the first.
    """

    def __init__(self, pool: PagePool, num_groups: int) -> None:
        self._pool = pool
        self._page_of: list[dict[int, int]] = [{} for _ in range(num_groups - 1)]
        self._owner_of: dict[int, tuple[int, int]] = {}  # page -> (index into _page_of, owner)
        self._idle: dict[int, int] = {}  # page -> tick of its release, oldest first; some may be in use again

    def publish(self, group: int, owners: Sequence[int], pages: Sequence[int]) -> None:
        """Files pages of a group under their owners. An owner keeps the page that it has."""
        page_of = self._page_of[group - 1]
        for owner, page in zip(owners, pages, strict=True):
            if page != NO_PAGE and self._pool.published[page] is None and owner not in page_of:
                page_of[owner] = page
                self._owner_of[page] = (group - 1, owner)
                self._pool.published[page] = PUBLISHED

    def pages(self, group: int, owners: Iterable[int]) -> list[int]:
        """A group's pages for the tokens of its owners; `NO_PAGE` where it was evicted."""
        page_of = self._page_of[group - 1]
        return [page_of.get(owner, NO_PAGE) for owner in owners]

    def release(self, pages: Iterable[int], tick: int) -> None:
        """One reference less to each page, `NO_PAGE` left out."""
        for page in pages:
            if page != NO_PAGE and self._pool.release((page,)):
                self._idle.pop(page, None)
                self._idle[page] = tick

    def oldest(self) -> int | None:
        """The tick at which the page that `evict` takes was released; None if no page is idle."""
        while self._idle:
            page, tick = next(iter(self._idle.items()))
            if page in self._owner_of and not self._pool.references[page]:
                return tick
            del self._idle[page]
        return None

    def evict(self) -> int:
        """Takes the idle page that was released first out of the cache; there must be one, see `oldest`."""
        page = next(iter(self._idle))
        self._forget(page)
        self._pool.idle -= 1
        return page

    def drop(self, owner: int) -> int:
        """The owner leaves the prefix tree: its idle pages are free, and their number is returned."""
        freed = 0
        for page_of in self._page_of:
            page = page_of.get(owner)
            if page is not None:
                self._forget(page)
                if not self._pool.references[page]:
                    self._pool.free.append(page)
                    self._pool.idle -= 1
                    freed += 1
        return freed

    def inherit(self, owner: int, heir: int) -> None:
        """Another page takes the owner's place in the tree."""
        for index, page_of in enumerate(self._page_of):
            if owner in page_of:
                page = page_of[heir] = page_of.pop(owner)
                self._owner_of[page] = (index, heir)

    def move(self, moves: Mapping[int, int]) -> None:
        """The rows of pages are in other pages now: page -> new page, all at once. What `PagePool.published` says is
        moved by the prefix tree.
        """
        self._page_of = [
            {moves.get(owner, owner): moves.get(page, page) for owner, page in page_of.items()}
            for page_of in self._page_of
        ]
        self._owner_of = {
            page: (index, owner) for index, page_of in enumerate(self._page_of) for owner, page in page_of.items()
        }
        self._idle = {moves.get(page, page): tick for page, tick in self._idle.items()}

    def clear(self) -> None:
        for page in self._owner_of:
            self._pool.published[page] = None
        for page_of in self._page_of:
            page_of.clear()
        self._owner_of.clear()
        self._idle.clear()

    def __contains__(self, page: int) -> bool:
        return page in self._owner_of

    def __len__(self) -> int:
        return len(self._owner_of)

    def all_pages(self) -> list[int]:
        return list(self._owner_of)

    def problem(self) -> str | None:
        """What contradicts itself, in one sentence; None if nothing does."""
        published, references = self._pool.published, self._pool.references
        filed = sum(len(page_of) for page_of in self._page_of)
        if filed != len(self._owner_of):
            return f"{filed} pages are filed under their owners and {len(self._owner_of)} are known"
        for page, (index, owner) in self._owner_of.items():
            if published[page] is not PUBLISHED or self._page_of[index].get(owner) != page:
                return f"page {page} is not filed under page {owner}"
            if published[owner] is None or published[owner] is PUBLISHED:
                return f"page {page} is filed under page {owner}, which is not in the prefix tree"
            if not references[page] and page not in self._idle:
                return f"the idle page {page} cannot be evicted"
        return None

    def _forget(self, page: int) -> None:
        index, owner = self._owner_of.pop(page)
        del self._page_of[index][owner]
        self._pool.published[page] = None
        self._idle.pop(page, None)
