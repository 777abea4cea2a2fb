"""The paged KV cache: which page holds which token of which sequence.

Single-threaded bookkeeping. Where the rows themselves lie is somebody else's: the coordinator's pages lie
in the shared arena and its workers write them; a program that embeds only the cache attaches a
`KvPageMemory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from hotset.runtime import kv_statistics
from hotset.runtime.kv_errors import CorruptCache, ExceedsArena, OutOfBounds, UnknownSequence
from hotset.runtime.kv_page_pool import PagePool
from hotset.runtime.kv_sequence import CachedSequence
from hotset.runtime.kv_statistics import FragmentationStats, PagedCacheStats

UNKNOWN_TOKEN = -1
"""Stands for a token whose id the cache was not told; pages with such tokens are never published."""


class PageMemory(Protocol):
    """Where the rows of the pages lie."""

    page_nbytes: int

    def copy_page(self, source: int, destination: int) -> None: ...

    def clear_pages(self, pages: Sequence[int]) -> None: ...


class PagedKvCache:
    """Block tables over `num_pages` pages of `block_size` tokens, with sharing and copy-on-write.

    A fresh cache hands out pages 1, 2, 3 ... A sequence is named by the integer that `allocate` or `fork`
    returned.
    Every call names an unknown sequence with `UnknownSequence`; a call that raises has changed nothing.

    Args:
        num_pages: pages in all; 0 is allowed and serves only empty sequences.
        block_size: tokens per page.
        page_nbytes: bytes of one page over all layers, for the memory figures.
        memory: if given, copies on write reach it and its pages are cleared before they are handed out, so
            that nobody reads the rows of an earlier owner.
    """

    def __init__(
        self, num_pages: int, block_size: int = 16, *, page_nbytes: int = 0, memory: PageMemory | None = None
    ) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages is {num_pages}, expected at least 0")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, expected at least 1")
        self.num_pages = num_pages
        self.block_size = block_size
        self.page_nbytes = memory.page_nbytes if memory else page_nbytes
        self._memory = memory
        self._pool = PagePool(num_pages)
        self._sequences: dict[int, CachedSequence] = {}
        self._pins: dict[int, int] = {}
        self._last_sequence = 0
        self._copies = 0

    # Sequences

    def allocate(self, num_tokens: int) -> int:
        """A sequence with pages for `num_tokens` tokens, which count as written.

        Raises:
            ExceedsArena: more pages than the arena has; OutOfPages: more than are available now.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}, expected at least 0")
        needed = -(-num_tokens // self.block_size)
        if needed > self.num_pages:
            raise ExceedsArena(needed, self.num_pages)
        return self._add(CachedSequence(self._take(needed), num_tokens, num_tokens))

    def extend(self, sequence: int, num_tokens: int) -> list[int]:
        """Reserves room for `num_tokens` tokens beyond what is reserved already, and returns the pages added.

        Raises:
            OutOfPages: not enough pages are available.
        """
        state = self._state(sequence)
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}, expected at least 0")
        reserved = state.reserved + num_tokens
        pages = self._take(-(-reserved // self.block_size) - len(state.table))
        state.table += pages
        state.reserved = reserved
        return pages

    def append(self, sequence: int, token: int = UNKNOWN_TOKEN) -> None:
        """One more written token, in the reserved room or in a new page; a shared tail page is copied first.

        Raises:
            OutOfPages: a page is needed and none is available.
        """
        try:
            state = self._sequences[sequence]
        except KeyError:
            raise UnknownSequence(sequence) from None
        length = state.length
        if length >= state.append_limit:
            self._open_tail(sequence, state)
        state.tokens.append(token)
        state.length = length + 1

    def commit(self, sequence: int, length: int) -> None:
        """Says that the rows of the first `length` tokens are written.

        Raises:
            OutOfBounds: no pages are held for that many tokens.
        """
        state = self._state(sequence)
        capacity = len(state.table) * self.block_size
        if not state.length <= length <= capacity:
            raise OutOfBounds(sequence, length, capacity)
        state.tokens.extend([UNKNOWN_TOKEN] * (length - len(state.tokens)))
        state.length = length
        state.reserved = max(state.reserved, length)
        self._set_append_limit(state)

    def truncate(self, sequence: int, length: int) -> list[int]:
        """Forgets the tokens from `length` on and gives back the pages behind them, which it returns.

        Raises:
            OutOfBounds: the sequence is shorter.
        """
        state = self._state(sequence)
        if not 0 <= length <= state.length:
            raise OutOfBounds(sequence, length, state.length)
        kept = -(-length // self.block_size)
        released = state.table[kept:]
        del state.table[kept:]
        del state.tokens[length:]
        state.length = state.reserved = length
        state.published = min(state.published, length // self.block_size)
        self._pool.release(released)
        self._set_append_limit(state)
        return released

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Every page is shared; whoever first writes into the partial
        tail page copies it (`writable_page` copies it at once)."""
        parent = self._state(sequence)
        length = parent.length
        child = CachedSequence(parent.table[: -(-length // self.block_size)], length, length)
        child.tokens = parent.tokens[:length]
        child.publishable = parent.publishable
        child.published = parent.published
        child.salt = parent.salt
        child.priority, child.priority_until = parent.priority, parent.priority_until
        self._pool.share(child.table)
        self._set_append_limit(parent)
        return self._add(child)

    def free(self, sequence: int) -> None:
        """Gives back the sequence's pages. Published ones stay findable until they are evicted."""
        state = self._state(sequence)
        del self._sequences[sequence]
        self._pool.release(state.table)

    # Positions

    def block_table(self, sequence: int) -> list[int]:
        """Page numbers in the order of the tokens."""
        return self._state(sequence).table.copy()

    def length(self, sequence: int) -> int:
        """Written tokens."""
        return self._state(sequence).length

    def slot(self, sequence: int, position: int) -> tuple[int, int]:
        """(page, offset in the page) of a token.

        Raises:
            OutOfBounds: no page is held for the position.
        """
        state = self._state(sequence)
        index, offset = divmod(position, self.block_size)
        if not 0 <= index < len(state.table):
            raise OutOfBounds(sequence, position, len(state.table) * self.block_size)
        return state.table[index], offset

    def page_for(self, sequence: int, position: int) -> int:
        """The page of a token; raises like `slot`."""
        return self.slot(sequence, position)[0]

    def slot_mapping(self, sequence: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """`page * block_size + offset` of the tokens `start` ... `stop - 1`, int64 `[stop - start]`;
        raises like `slot`.
        """
        state = self._state(sequence)
        capacity = len(state.table) * self.block_size
        for position in (start, stop - 1):
            if start < stop and not 0 <= position < capacity:
                raise OutOfBounds(sequence, position, capacity)
        positions = np.arange(start, stop)
        index, offset = np.divmod(positions, self.block_size)
        return np.asarray(state.table, np.int64)[index] * self.block_size + offset

    def writable_page(self, sequence: int, position: int) -> int:
        """The page of a token, made the sequence's own: a page that others name or that is published is
        copied first.

        Raises:
            OutOfBounds: no page is held for the position. OutOfPages: a copy is needed and no page is
                available.
        """
        page = self.page_for(sequence, position)
        if self._is_writable(page):
            return page
        state = self._sequences[sequence]
        (copy,) = self._take(1)
        if self._memory:
            self._memory.copy_page(page, copy)
        index = position // self.block_size
        state.table[index] = copy
        state.published = min(state.published, index)
        self._pool.release((page,))
        self._copies += 1
        self._set_append_limit(state)
        return copy

    # Pages

    def pin(self, pages: Sequence[int]) -> None:
        """Keeps pages where they are, with their bytes, until `unpin`: neither eviction nor compaction
        takes them.
        """
        for page in pages:
            exists = 1 <= page <= self.num_pages
            if not exists or not (self._pool.references[page] or self._pool.published[page]):
                raise ValueError(f"page {page} holds nothing that could be pinned")
        self._pool.share(pages)
        for page in pages:
            self._pins[page] = self._pins.get(page, 0) + 1

    def unpin(self, pages: Sequence[int]) -> None:
        """Takes back one `pin` of the same pages."""
        for page in set(pages):
            if self._pins.get(page, 0) < pages.count(page):
                raise ValueError(f"page {page} is not pinned that often")
        for page in pages:
            self._pins[page] -= 1
            if not self._pins[page]:
                del self._pins[page]
        self._pool.release(pages)

    def references(self, page: int) -> int:
        """Block tables that name the page + its pins."""
        return self._pool.references[page]

    def generation(self, page: int) -> int:
        """How often the page was handed out: who kept an older number must not take its bytes for the old
        ones.
        """
        return self._pool.generations[page]

    @property
    def num_free_pages(self) -> int:
        """Pages that an allocation can have, idle cached ones included."""
        return self._pool.available

    @property
    def num_used_pages(self) -> int:
        """Pages that a block table names or a pin holds."""
        return self.num_pages - self._pool.available

    @property
    def utilisation(self) -> float:
        """Share of the pages in use; 0.0 if there are none."""
        return self.num_used_pages / self.num_pages if self.num_pages else 0.0

    @property
    def capacity_tokens(self) -> int:
        return self.num_pages * self.block_size

    @property
    def memory_nbytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_nbytes

    @property
    def memory_used_nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.num_used_pages * self.page_nbytes

    # Statistics

    def stats(self) -> PagedCacheStats:
        pool = self._pool
        allocated = sum(pool.generations)
        return PagedCacheStats(
            sequences_allocated=self._last_sequence,
            sequences_freed=self._last_sequence - len(self._sequences),
            active_sequences=len(self._sequences),
            pages_allocated=allocated,
            pages_freed=allocated - self.num_used_pages - pool.idle,
            pages_used=self.num_used_pages,
            pages_idle=pool.idle,
            pages_free=len(pool.free),
            copy_on_write_copies=self._copies,
        )

    def fragmentation(self) -> FragmentationStats:
        """See `FragmentationStats`; linear in the pages."""
        return kv_statistics.fragmentation(
            self._pool.free,
            self.num_pages,
            self.block_size,
            [(state.table, state.length) for state in self._sequences.values()],
            self._pool.idle,
        )

    def contiguity(self, sequence: int) -> float:
        """1.0 if the pages of the sequence are one ascending run, 0.0 if no two neighbours are."""
        return kv_statistics.contiguity(self._state(sequence).table)

    def check(self) -> None:
        """Proves that the bookkeeping is consistent; linear in the pages, for tests and stress runs.

        Raises:
            CorruptCache: it is not.
        """
        pool = self._pool
        named = [0] * (self.num_pages + 1)
        for state in self._sequences.values():
            if not 0 <= state.length <= state.reserved <= len(state.table) * self.block_size:
                raise CorruptCache(f"{state.length} tokens do not fit {len(state.table)} pages")
            for page in state.table:
                named[page] += 1
        for page, count in self._pins.items():
            named[page] += count
        free = set(pool.free)
        if len(free) != len(pool.free):
            raise CorruptCache("a page is in the free list twice")
        idle = 0
        for page in range(1, self.num_pages + 1):
            if pool.references[page] != named[page]:
                raise CorruptCache(
                    f"page {page} counts {pool.references[page]} references and has {named[page]}"
                )
            published = pool.published[page] is not None
            idle += published and not named[page]
            if (page in free) != (not named[page] and not published):
                raise CorruptCache(f"page {page} is {'' if page in free else 'not '}in the free list")
        if idle != pool.idle:
            raise CorruptCache(f"{pool.idle} pages are counted as idle and {idle} are")

    # Details

    def _state(self, sequence: int) -> CachedSequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise UnknownSequence(sequence) from None

    def _add(self, state: CachedSequence) -> int:
        state.tokens.extend([UNKNOWN_TOKEN] * (state.length - len(state.tokens)))
        self._set_append_limit(state)
        self._last_sequence += 1
        self._sequences[self._last_sequence] = state
        return self._last_sequence

    def _take(self, count: int) -> list[int]:
        if count <= 0:
            return []
        pages = self._pool.take(count)
        if self._memory:
            self._memory.clear_pages(pages)
        return pages

    def _is_writable(self, page: int) -> bool:
        return (
            self._pool.references[page] - self._pins.get(page, 0) == 1 and self._pool.published[page] is None
        )

    def _set_append_limit(self, state: CachedSequence) -> None:
        index, offset = divmod(state.length, self.block_size)
        if offset and self._is_writable(state.table[index]):
            state.append_limit = (index + 1) * self.block_size
        else:
            state.append_limit = state.length

    def _open_tail(self, sequence: int, state: CachedSequence) -> None:
        """Makes the page of the next token exist and belong to this sequence alone."""
        index = state.length // self.block_size
        if index == len(state.table):
            state.table += self._take(1)
        else:
            self.writable_page(sequence, state.length)
        state.reserved = max(state.reserved, state.length + 1)
        state.append_limit = (index + 1) * self.block_size
