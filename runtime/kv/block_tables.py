"""Block tables: which page holds which token of which sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hotset.runtime.kv.errors import ExceedsArena, OutOfBounds, UnknownSequence
from hotset.runtime.kv.page_pool import NO_PAGE, PagePool
from hotset.runtime.kv.sequence import CachedSequence

UNKNOWN_TOKEN = -1
"""Stands for a token whose id the cache was not told."""


class PageMemory(Protocol):
    """Where the rows of the pages lie."""

    @property
    def page_nbytes(self) -> int: ...

    def copy_page(self, source: int, destination: int) -> None: ...

    def clear_pages(self, pages: Sequence[int]) -> None: ...


class BlockTables:
    """Sequences over `num_pages` pages of `block_size` tokens, forked with copy-on-write.

    A fresh instance hands out pages 1, 2, 3 ... A sequence is named by the integer that `allocate` or `fork` returned.
    Every call names an unknown sequence with `UnknownSequence`; a call that raises has changed nothing.

    Args:
        num_pages: pages in all; 0 is allowed and serves only empty sequences.
        block_size: tokens per page.
        memory: where the rows lie. If given, copies on write reach it, and its pages are cleared before they are
            handed out, so that nobody reads the rows of an earlier owner.
    """

    def __init__(self, num_pages: int, block_size: int = 16, *, memory: PageMemory | None = None) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages is {num_pages}, expected at least 0")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, expected at least 1")
        self.num_pages = num_pages
        self.block_size = block_size
        self._memory = memory
        self._pool = PagePool(num_pages)
        self._sequences: dict[int, CachedSequence] = {}
        self._last_sequence = 0
        self._copies = 0

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
        reserved = max(state.reserved, state.length) + num_tokens
        pages = self._take(-(-reserved // self.block_size) - len(state.table))
        state.table += pages
        state.reserved = reserved
        return pages

    def append(self, sequence: int, token: int = UNKNOWN_TOKEN) -> None:
        """One more written token, in the reserved room or in a new page; a shared tail page is copied first.

        Raises:
            OutOfPages: a page is needed and none is available. ValueError: the prompt is not committed yet.
        """
        try:
            state = self._sequences[sequence]
        except KeyError:
            raise UnknownSequence(sequence) from None
        length = state.length
        if length < state.append_limit:
            state.length = length + 1
            if state.publishable:
                state.tokens.append(token)
        else:
            self._append_at_limit(sequence, state, token)

    def truncate(self, sequence: int, length: int) -> list[int]:
        """Forgets the tokens from `length` on and gives back the pages behind them, which it returns.

        Raises:
            OutOfBounds: the sequence is shorter, or the page of the last token left was released.
        """
        state = self._state(sequence)
        if not state.released * self.block_size <= length <= state.length:
            raise OutOfBounds(sequence, length, state.length)
        kept = -(-length // self.block_size)
        released = state.table[kept:]
        del state.table[kept:]
        del state.tokens[length:]
        state.length = state.reserved = length
        state.published = min(state.published, length // self.block_size)
        self._release(released)
        self._settle(state)
        return released

    def release_before(self, sequence: int, position: int) -> list[int]:
        """Gives back the pages that lie wholly before a position (sliding window), and returns them. Their entries in
        the block table become `NO_PAGE`.

        Raises:
            OutOfBounds: the sequence is shorter.
        """
        state = self._state(sequence)
        if not 0 <= position <= state.length:
            raise OutOfBounds(sequence, position, state.length)
        passed = position // self.block_size
        pages = state.table[state.released : passed]
        if pages:
            state.table[state.released : passed] = [NO_PAGE] * len(pages)
            state.released = passed
            for page in pages:
                self._release((page,))
        return pages

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Every page is shared; whoever first writes into the partial tail page
        copies it (`writable_page` copies it at once).
        """
        parent = self._state(sequence)
        length = parent.length
        child = CachedSequence(parent.table[: -(-length // self.block_size)], length, length)
        child.tokens = parent.tokens[:length]
        child.publishable = parent.publishable
        child.published = parent.published
        child.released = parent.released
        child.salt, child.priority, child.retention = parent.salt, parent.priority, parent.retention
        self._pool.share(child.table)
        self._settle(parent)
        return self._add(child)

    def free(self, sequence: int) -> None:
        """Gives back the sequence's pages. Published ones stay findable until they are evicted."""
        state = self._state(sequence)
        del self._sequences[sequence]
        self._release(state.table)

    # Positions

    def block_table(self, sequence: int) -> list[int]:
        """Page numbers in the order of the tokens."""
        return self._state(sequence).table.copy()

    def num_blocks(self, sequence: int) -> int:
        """Entries of the block table."""
        return len(self._state(sequence).table)

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
        if not state.released <= index < len(state.table):
            raise OutOfBounds(sequence, position, len(state.table) * self.block_size)
        return state.table[index], offset

    def page_for(self, sequence: int, position: int) -> int:
        """The page of a token; raises like `slot`."""
        return self.slot(sequence, position)[0]

    def slot_mapping(self, sequence: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """`page * block_size + offset` of tokens, int64 `[stop - start]`; raises like `slot`."""
        state = self._state(sequence)
        capacity = len(state.table) * self.block_size
        for position in (start, stop - 1):
            if start < stop and not state.released * self.block_size <= position < capacity:
                raise OutOfBounds(sequence, position, capacity)
        index, offset = np.divmod(np.arange(start, stop), self.block_size)
        return np.asarray(state.table, np.int64)[index] * self.block_size + offset

    def writable_page(self, sequence: int, position: int) -> int:
        """The page of a token, made the sequence's own: a page that others name or that is published is copied first.

        A sequence that writes published rows anew publishes nothing more: they need not be what its tokens say.

        Raises:
            OutOfBounds: no page is held for the position. OutOfPages: a copy is needed and no page is available.
        """
        page = self.page_for(sequence, position)
        if self._is_writable(page):
            return page
        state = self._sequences[sequence]
        copy = self._take_one()
        if self._memory:
            self._memory.copy_page(page, copy)
        index = position // self.block_size
        state.table[index] = copy
        if index < state.published:
            state.published, state.publishable = index, False
        self._release((page,))
        self._copies += 1
        self._settle(state)
        return copy

    # Details

    def _state(self, sequence: int) -> CachedSequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise UnknownSequence(sequence) from None

    def _add(self, state: CachedSequence) -> int:
        self._settle(state)
        self._last_sequence += 1
        self._sequences[self._last_sequence] = state
        return self._last_sequence

    def _take(self, count: int) -> list[int]:
        if count <= 0:
            return []
        if count == 1:
            return [self._take_one()]
        pages = self._pool.take(count)
        if self._memory:
            self._memory.clear_pages(pages)
        return pages

    def _take_one(self) -> int:
        page = self._pool.take_one()
        if self._memory:
            self._memory.clear_pages((page,))
        return page

    def _append_at_limit(self, sequence: int, state: CachedSequence, token: int) -> None:
        """`append` where a page begins, is filled, or is not the sequence's own."""
        if state.publishable and len(state.tokens) != state.length:
            raise ValueError(
                f"sequence {sequence} has committed {state.length} of the {len(state.tokens)} tokens "
                "of its prompt; commit them before appending"
            )
        if state.length == len(state.table) * self.block_size:
            state.table.append(self._take_one())
        else:
            self.writable_page(sequence, state.length)
        state.length += 1
        if state.publishable:
            state.tokens.append(token)
        self._settle(state)

    def _settle(self, state: CachedSequence) -> None:
        """Finds out how far appending needs no second look. To be called when the length or the tail changed."""
        index, offset = divmod(state.length, self.block_size)
        if offset and self._is_writable(state.table[index]):
            # The token that fills a page to be published needs one too.
            state.append_limit = (index + 1) * self.block_size - state.publishable
        else:
            state.append_limit = state.length

    def _release(self, pages: Sequence[int]) -> None:
        """One reference less to each page, given in the order of the tokens."""
        self._pool.release(pages)

    def _is_writable(self, page: int) -> bool:
        """Whether the one sequence that names the page may write it."""
        return self._pool.is_writable(page)
