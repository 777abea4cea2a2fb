"""Sequences of tokens in pages: how they begin, grow, fork, shrink and end."""

from __future__ import annotations

from array import array
from typing import Any

from hotset.runtime.argument_types import integer
from hotset.runtime.kv.errors import ExceedsArena, OutOfBounds, UnknownSequence
from hotset.runtime.kv.sequence import CachedSequence
from hotset.runtime.kv.sequence_tables import SequenceTables

UNKNOWN_TOKEN = -1
"""Stands for a token whose id the cache was not told."""


class BlockTables(SequenceTables):
    """Sequences over `num_pages` pages of `block_size` tokens, forked with copy-on-write.

    A fresh instance hands out pages 1, 2, 3 ... A sequence is named by the integer that `allocate` or `fork` returned.
    Every call names an unknown sequence with `UnknownSequence`; a call that raises has changed nothing.

    Layers that see only a window of positions are a group with block tables of its own (`LayerGroups`): what a call
    says of pages holds in every group, and pages wholly behind a group's window are given back as the sequence grows.
    """

    def allocate(self, num_tokens: int) -> int:
        """A sequence with pages for `num_tokens` tokens, which count as written.

        Raises:
            ExceedsArena: more pages than the arena has; OutOfPages: more than are available now.
        """
        num_tokens = integer("num_tokens", num_tokens, 0)
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
        num_tokens = integer("num_tokens", num_tokens, 0)
        return self.reserve(sequence, max(state.reserved, state.length) + num_tokens)

    def reserve(self, sequence: int, num_tokens: int, *, written: int | None = None) -> list[int]:
        """Reserves room for `num_tokens` tokens in all, and returns the pages added.

        Args:
            written: tokens that are written, if more than the cache was told.

        Raises:
            OutOfPages: not enough pages are available.
        """
        state = self._state(sequence)
        reserved = max(state.reserved, state.length, integer("num_tokens", num_tokens, 0))
        written = state.length if written is None else max(state.length, integer("written", written, 0))
        pages = self._cover(state, reserved, written)
        state.reserved = reserved
        return pages

    def append(self, sequence: int, token: int = UNKNOWN_TOKEN) -> None:
        """One more written token, in the reserved room or in a new page; a shared tail page is copied first.

        Raises:
            OutOfPages: a page is needed and none is available. ValueError: the prompt is not committed yet.
        """
        try:
            state = self._sequences[sequence]
        except (KeyError, TypeError):
            raise UnknownSequence(sequence) from None
        length = state.length
        if length < state.append_limit:
            if state.publishable:
                try:
                    state.tokens.append(token)
                except (TypeError, OverflowError):
                    raise _no_token(token) from None
            state.length = length + 1
        else:
            self._append_at_limit(sequence, state, token)

    def truncate(self, sequence: int, length: int) -> list[int]:
        """Forgets the tokens from `length` on and gives back the pages behind them, which it returns.

        Raises:
            OutOfBounds: the sequence is shorter, or a page that the next token would see was given back.
        """
        state = self._state(sequence)
        length = integer("length", length)
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
        position = integer("position", position)
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
            self._pool.share_used(table)
        self._settle(parent)
        return self._add(child)

    def free(self, sequence: int) -> None:
        """Gives back the sequence's pages. Published ones stay findable until they are evicted."""
        state = self._state(sequence)
        del self._sequences[sequence]
        for group, table in enumerate(state.tables):
            self._release(table, group)

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

    def _append_at_limit(self, sequence: int, state: CachedSequence, token: int) -> None:
        """`append` where a page begins, is filled, or is not the sequence's own."""
        if state.publishable and len(state.tokens) != state.length:
            raise ValueError(
                f"sequence {sequence} has committed {state.length} of the {len(state.tokens)} tokens "
                "of its prompt; commit them before appending"
            )
        if state.publishable:
            try:
                array("i", (token,))  # before anything is done
            except (TypeError, OverflowError):
                raise _no_token(token) from None
        length = state.length
        if length < min(map(len, state.tables)) * self.block_size:
            self.writable_page(sequence, length)
        elif len(state.tables) == 1:
            state.table.append(self._take_one())  # what _cover does, without lists
        else:
            self._cover(state, max(state.reserved, length + 1), length)
        state.length = length + 1
        if state.publishable:
            state.tokens.append(token)
        self._settle(state)
        if self._windowed:
            self._move_windows(state)


def _no_token(token: Any) -> ValueError:
    return ValueError(f"token is {token!r}, expected an integer of 32 bits")
