"""Block tables: which page holds which token of which sequence."""

from __future__ import annotations

import math
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

    Layers that see only a window of positions are a group with block tables of its own (`LayerGroups`): what a call
    says of pages holds in every group, and pages wholly behind a group's window are given back as the sequence grows.

    Args:
        num_pages: pages in all; 0 is allowed and serves only empty sequences.
        block_size: tokens per page.
        windows: per group of layers, how many positions a row sees, its own included; 0: all.
        max_step: groups with a window have pages only for so many tokens beyond the written ones, more as the sequence
            grows and `reserve` asks for them; None: for all that are reserved.
        memory: where the rows lie. If given, copies on write reach it, and its pages are cleared before they are
            handed out, so that nobody reads the rows of an earlier owner.
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int = 16,
        *,
        windows: Sequence[int] = (0,),
        max_step: int | None = None,
        memory: PageMemory | None = None,
    ) -> None:
        if num_pages < 0:
            raise ValueError(f"num_pages is {num_pages}, expected at least 0")
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, expected at least 1")
        furthest = max(windows, key=lambda window: window or math.inf, default=-1)
        if not windows or furthest != windows[0] or min(windows) < 0:
            raise ValueError(f"windows are {tuple(windows)}, expected the one that sees furthest (0: all) first")
        if max_step is not None and max_step < 1:
            raise ValueError(f"max_step is {max_step}, expected at least 1")
        self.num_pages = num_pages
        self.block_size = block_size
        self.windows = tuple(windows)
        self.max_step = max_step
        self._windowed = [(group, window) for group, window in enumerate(windows) if window]
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
        state = CachedSequence([[] for _ in self.windows], num_tokens, num_tokens)
        self._skip_unseen(state)
        needed = sum(self._missing(state, num_tokens, num_tokens))
        if needed > self.num_pages:
            raise ExceedsArena(needed, self.num_pages)
        self._cover(state, num_tokens, num_tokens)
        return self._add(state)

    def extend(self, sequence: int, num_tokens: int) -> list[int]:
        """Reserves room for `num_tokens` tokens beyond what is reserved already, and returns the pages added.

        Raises:
            OutOfPages: not enough pages are available.
        """
        state = self._state(sequence)
        if num_tokens < 0:
            raise ValueError(f"num_tokens is {num_tokens}, expected at least 0")
        return self.reserve(sequence, max(state.reserved, state.length) + num_tokens)

    def reserve(self, sequence: int, num_tokens: int, *, written: int | None = None) -> list[int]:
        """Reserves room for `num_tokens` tokens in all, and returns the pages added.

        Args:
            written: tokens that are written, if more than the cache was told.

        Raises:
            OutOfPages: not enough pages are available.
        """
        state = self._state(sequence)
        reserved = max(state.reserved, state.length, num_tokens)
        pages = self._cover(state, reserved, max(state.length, written or 0))
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
            OutOfBounds: the sequence is shorter, or a page that the next token would see was given back.
        """
        state = self._state(sequence)
        unseen = self._first_blocks(length)
        if not state.released[0] * self.block_size <= length <= state.length or any(
            state.released[group] > unseen[group] for group, _ in self._windowed
        ):
            raise OutOfBounds(sequence, length, state.length)
        kept = -(-length // self.block_size)
        given_back = [table[kept:] for table in state.tables]
        for table in state.tables:
            del table[kept:]
        del state.tokens[length:]
        state.length = state.reserved = length
        state.published = min(state.published, length // self.block_size)
        for group, pages in enumerate(given_back):
            self._release(pages, group)
        self._settle(state)
        return [page for pages in given_back for page in pages]

    def release_before(self, sequence: int, position: int) -> list[int]:
        """Gives back the pages that lie wholly before a position, and returns them: for a caller that knows a sliding
        window which the cache does not. Their entries in the block table, that of the first group, become `NO_PAGE`.

        Raises:
            OutOfBounds: the sequence is shorter.
        """
        state = self._state(sequence)
        if not 0 <= position <= state.length:
            raise OutOfBounds(sequence, position, state.length)
        return self._release_blocks(state, 0, position // self.block_size)

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Every page is shared; whoever first writes into the partial tail page
        copies it (`writable_page` copies it at once).
        """
        parent = self._state(sequence)
        length = parent.length
        blocks = -(-length // self.block_size)
        child = CachedSequence([table[:blocks] for table in parent.tables], length, length)
        child.tokens = parent.tokens[:length]
        child.publishable = parent.publishable
        child.published = parent.published
        child.released = parent.released.copy()
        child.salt, child.priority, child.retention = parent.salt, parent.priority, parent.retention
        for table in child.tables:
            self._pool.share(table)
        self._settle(parent)
        return self._add(child)

    def free(self, sequence: int) -> None:
        """Gives back the sequence's pages. Published ones stay findable until they are evicted."""
        state = self._state(sequence)
        del self._sequences[sequence]
        for group, table in enumerate(state.tables):
            self._release(table, group)

    # Positions

    def block_table(self, sequence: int, group: int = 0) -> list[int]:
        """Page numbers in the order of the tokens; `NO_PAGE` for those that were given back."""
        return self._state(sequence).tables[group].copy()

    def num_blocks(self, sequence: int) -> int:
        """Entries that the block tables of all groups have: there is room for so many blocks of tokens."""
        return min(map(len, self._state(sequence).tables))

    def num_released(self, sequence: int, group: int = 0) -> int:
        """Entries of the block table in front whose pages were given back."""
        return self._state(sequence).released[group]

    def length(self, sequence: int) -> int:
        """Written tokens."""
        return self._state(sequence).length

    def slot(self, sequence: int, position: int, group: int = 0) -> tuple[int, int]:
        """(page, offset in the page) of a token.

        Raises:
            OutOfBounds: no page is held for the position.
        """
        state = self._state(sequence)
        table = state.tables[group]
        index, offset = divmod(position, self.block_size)
        if not state.released[group] <= index < len(table):
            raise OutOfBounds(sequence, position, len(table) * self.block_size)
        return table[index], offset

    def page_for(self, sequence: int, position: int, group: int = 0) -> int:
        """The page of a token; raises like `slot`."""
        return self.slot(sequence, position, group)[0]

    def slot_mapping(self, sequence: int, start: int, stop: int, group: int = 0) -> npt.NDArray[np.int64]:
        """`page * block_size + offset` of tokens, int64 `[stop - start]`; raises like `slot`."""
        state = self._state(sequence)
        table, released = state.tables[group], state.released[group]
        capacity = len(table) * self.block_size
        for position in (start, stop - 1):
            if start < stop and not released * self.block_size <= position < capacity:
                raise OutOfBounds(sequence, position, capacity)
        index, offset = np.divmod(np.arange(start, stop), self.block_size)
        return np.asarray(table, np.int64)[index] * self.block_size + offset

    def writable_page(self, sequence: int, position: int, group: int = 0) -> int:
        """The page of a token, made the sequence's own: a page that others name or that is published is copied first,
        and so are those that the other groups have for the token.

        A sequence that writes published rows anew publishes nothing more: they need not be what its tokens say.

        Raises:
            OutOfBounds: no page is held for the position. OutOfPages: a copy is needed and no page is available.
        """
        self.page_for(sequence, position, group)
        state = self._sequences[sequence]
        index = position // self.block_size
        shared = self._shared_at(state, index)
        if shared:
            for group_to_copy, copy in zip(shared, self._take(len(shared)), strict=True):
                table = state.tables[group_to_copy]
                page, table[index] = table[index], copy
                if self._memory:
                    self._memory.copy_page(page, copy)
                self._release((page,), group_to_copy)
            if index < state.published:
                state.published, state.publishable = index, False
            self._copies += len(shared)
            self._settle(state)
        return state.tables[group][index]

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

    def _missing(self, state: CachedSequence, reserved: int, written: int) -> list[int]:
        """Per group, the pages that its table lacks to have room for `reserved` tokens, or, behind a window, for
        `max_step` tokens more than are written.
        """
        ahead = reserved if self.max_step is None else min(reserved, written + self.max_step)
        return [
            max(0, -(-(ahead if window else reserved) // self.block_size) - len(table))
            for window, table in zip(self.windows, state.tables, strict=True)
        ]

    def _cover(self, state: CachedSequence, reserved: int, written: int) -> list[int]:
        """Takes the missing pages, all or none, and returns them."""
        missing = self._missing(state, reserved, written)
        pages = self._take(sum(missing))
        start = 0
        for table, count in zip(state.tables, missing, strict=True):
            table += pages[start : start + count]
            start += count
        return pages

    def _first_blocks(self, length: int) -> list[int]:
        """Per group, the block of the first position that a token at `length` or later sees."""
        return [max(0, length + 1 - window) // self.block_size if window else 0 for window in self.windows]

    def _skip_unseen(self, state: CachedSequence) -> None:
        """In fresh tables: no pages for what no later token sees."""
        state.released = self._first_blocks(state.length)
        for table, released in zip(state.tables, state.released, strict=True):
            table[:] = [NO_PAGE] * released

    def _move_windows(self, state: CachedSequence) -> None:
        """Gives back what no later token sees. To be called when the length has grown."""
        for group, window in self._windowed:
            passed = (state.length + 1 - window) // self.block_size
            if passed > state.released[group]:
                self._release_blocks(state, group, passed)

    def _release_blocks(self, state: CachedSequence, group: int, passed: int) -> list[int]:
        table, released = state.tables[group], state.released[group]
        pages = table[released:passed]
        if pages:
            table[released:passed] = [NO_PAGE] * len(pages)
            state.released[group] = passed
            for page in pages:
                self._release((page,), group)
        return pages

    def _shared_at(self, state: CachedSequence, index: int) -> list[int]:
        """The groups whose page of a block has to be copied before it may be written."""
        return [
            group
            for group, table in enumerate(state.tables)
            if state.released[group] <= index < len(table) and not self._is_writable(table[index])
        ]

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
        length = state.length
        if length == min(map(len, state.tables)) * self.block_size:
            self._cover(state, max(state.reserved, length + 1), length)
        else:
            self.writable_page(sequence, length)
        state.length = length + 1
        if state.publishable:
            state.tokens.append(token)
        self._settle(state)
        if self._windowed:
            self._move_windows(state)

    def _settle(self, state: CachedSequence) -> None:
        """Finds out how far appending needs no second look. To be called when the length or the tail changed."""
        index, offset = divmod(state.length, self.block_size)
        if offset and all(self._is_writable(table[index]) for table in state.tables):
            # The token that fills a page to be published needs one too.
            state.append_limit = (index + 1) * self.block_size - state.publishable
        else:
            state.append_limit = state.length

    def _release(self, pages: Sequence[int], group: int = 0) -> None:
        """One reference less to each page of a group, given in the order of the tokens."""
        self._pool.release(pages)

    def _is_writable(self, page: int) -> bool:
        """Whether the one sequence that names the page may write it."""
        return self._pool.is_writable(page)
