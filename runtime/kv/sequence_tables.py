"""The block tables of all sequences, per group of layers: what they say, and what they lack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import check_integers, integer
from hotset.runtime.kv.config import CacheConfig
from hotset.runtime.kv.errors import OutOfBounds, UnknownSequence
from hotset.runtime.kv.page_pool import NO_PAGE, PagePool
from hotset.runtime.kv.sequence import CachedSequence


class SequenceTables:
    """Which page holds which token of which sequence. `BlockTables` says how that changes."""

    def __init__(self, config: CacheConfig) -> None:
        self.num_pages = config.num_pages
        self.block_size = config.block_size
        self.windows = tuple(config.windows)
        self.max_step = config.max_step
        self._windowed = [(group, window) for group, window in enumerate(self.windows) if window]
        self._memory = config.memory
        self._pool = PagePool(config.num_pages)
        self._sequences: dict[int, CachedSequence] = {}
        self._last_sequence = 0
        self._copies: int = 0

    # Positions

    def block_table(self, sequence: int, group: int = 0) -> list[int]:
        """Page numbers in the order of the tokens; `NO_PAGE` for those that were given back."""
        return self._table(self._state(sequence), group).copy()

    def num_blocks(self, sequence: int) -> int:
        """Entries that the block tables of all groups have: there is room for so many blocks of tokens."""
        return min(map(len, self._state(sequence).tables))

    def num_released(self, sequence: int, group: int = 0) -> int:
        """Entries of the block table in front whose pages were given back."""
        state = self._state(sequence)
        self._table(state, group)
        return state.released[group]

    def length(self, sequence: int) -> int:
        """Written tokens."""
        return self._state(sequence).length

    def slot(self, sequence: int, position: int, group: int = 0) -> tuple[int, int]:
        """(page, offset in the page) of a token.

        Raises:
            OutOfBounds: no page is held for the position.
        """
        state = self._state(sequence)
        try:
            table = state.tables[group]
            index, offset = divmod(position, self.block_size)
            if not state.released[group] <= index < len(table):
                raise OutOfBounds(sequence, position, len(table) * self.block_size)
            return table[index], offset
        except (TypeError, IndexError):
            self._table(state, group)
            check_integers(position=position)
            raise

    def page_for(self, sequence: int, position: int, group: int = 0) -> int:
        """The page of a token; raises like `slot`."""
        return self.slot(sequence, position, group)[0]

    def slot_mapping(self, sequence: int, start: int, stop: int, group: int = 0) -> npt.NDArray[np.int64]:
        """`page * block_size + offset` of tokens, int64 `[stop - start]`; raises like `slot`."""
        state = self._state(sequence)
        table = self._table(state, group)
        start, stop, released = integer("start", start), integer("stop", stop), state.released[group]
        capacity = len(table) * self.block_size
        for position in (start, stop - 1):
            if start < stop and not released * self.block_size <= position < capacity:
                raise OutOfBounds(sequence, position, capacity)
        index, offset = np.divmod(np.arange(start, stop), self.block_size)
        return np.asarray(table, np.int64)[index] * self.block_size + offset

    # For those who change them

    def _state(self, sequence: int) -> CachedSequence:
        try:
            return self._sequences[sequence]
        except (KeyError, TypeError):  # TypeError: it cannot even be looked up
            raise UnknownSequence(sequence) from None

    def _table(self, state: CachedSequence, group: int) -> list[int]:
        try:
            return state.tables[group]
        except (TypeError, IndexError):
            integer("group", group, 0, len(state.tables) - 1)
            raise

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

    def _settle(self, state: CachedSequence) -> None:
        """Finds out how far appending needs no second look. To be called when the length or the tail changed."""
        index, offset = divmod(state.length, self.block_size)
        state.append_limit = state.length
        if not offset:
            return
        for table in state.tables:
            if not self._is_writable(table[index]):
                return
        # The token that fills a page to be published needs a second look too.
        state.append_limit = (index + 1) * self.block_size - state.publishable

    def _release(self, pages: Sequence[int], group: int = 0) -> None:
        """One reference less to each page of a group, given in the order of the tokens."""
        self._pool.release(pages)

    def _is_writable(self, page: int) -> bool:
        """Whether the one sequence that names the page may write it."""
        return self._pool.is_writable(page)
