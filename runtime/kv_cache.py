"""The paged KV cache: which page holds which token of which sequence.

Single-threaded bookkeeping. Where the rows themselves lie is somebody else's: the coordinator's pages lie
in the shared arena and its workers write them; a program that embeds only the cache attaches a
`KvPageMemory`.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hotset.runtime import kv_statistics
from hotset.runtime.kv_compaction import plan_moves
from hotset.runtime.kv_errors import CorruptCache, ExceedsArena, OutOfBounds, OutOfPages, UnknownSequence
from hotset.runtime.kv_events import CacheEvent
from hotset.runtime.kv_page_memory import KvPageMemory
from hotset.runtime.kv_page_pool import NO_PAGE, PagePool
from hotset.runtime.kv_sequence import CachedSequence
from hotset.runtime.kv_statistics import FragmentationStats, HitRateWindow, PagedCacheStats
from hotset.runtime.prefix_cache import PrefixCache, TokenIds, pack_tokens
from hotset.runtime.prefix_eviction import DEFAULT_PRIORITY

UNKNOWN_TOKEN = -1
"""Stands for a token whose id the cache was not told; pages with such tokens are never published."""

# Occurs in packed ids, at whatever alignment, only if one is negative: others have a top byte below 0x80.
_UNKNOWN_PACKED = b"\xff" * 4


class Admission(NamedTuple):
    """A sequence with pages for a prompt; the rows of its first `hit_tokens` tokens were in the cache."""

    sequence: int
    hit_tokens: int


class PageMemory(Protocol):
    """Where the rows of the pages lie."""

    page_nbytes: int

    def copy_page(self, source: int, destination: int) -> None: ...

    def clear_pages(self, pages: Sequence[int]) -> None: ...


class PagedKvCache:
    """Block tables over `num_pages` pages of `block_size` tokens, with sharing and copy-on-write.

    A fresh cache hands out pages 1, 2, 3 ... A sequence is named by the integer that `allocate`, `admit` or
    `fork` returned. Every call names an unknown sequence with `UnknownSequence`; a call that raises has
    changed nothing.

    Prompts whose token ids are given to `admit` share the full pages that they have in common with earlier
    ones of the same salt. A page is published (can be found) when all its tokens are committed.

    Args:
        num_pages: pages in all; 0 is allowed and serves only empty sequences.
        block_size: tokens per page.
        page_nbytes: bytes of one page over all layers, for the memory figures.
        memory: where the rows lie, for example a `KvPageMemory`. If given, copies on write reach it and its pages
            are cleared before they are handed out, so that nobody reads the rows of an earlier owner.
        enable_prefix_caching: without it nothing is published and every hit is 0.
        hit_rate_window: requests that `hit_rate` looks back.
        events: whether to collect what `take_events` returns.
        clock: seconds, for priorities with a time limit.
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int = 16,
        *,
        page_nbytes: int = 0,
        memory: PageMemory | None = None,
        enable_prefix_caching: bool = True,
        hit_rate_window: int = 1000,
        events: bool = False,
        clock: Callable[[], float] = time.monotonic,
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
        self._enable_prefix_caching = enable_prefix_caching
        self._prefixes = PrefixCache(self._pool, 4 * block_size, clock, events)
        self._find = self._prefixes.find
        self._hit_rate = HitRateWindow(hit_rate_window)
        self._misses = 0
        self._copies = self._defragmentations = self._pages_moved = 0

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
        reserved = max(state.reserved, state.length) + num_tokens
        pages = self._take(-(-reserved // self.block_size) - len(state.table))
        state.table += pages
        state.reserved = reserved
        return pages

    def admit(
        self,
        tokens: TokenIds,
        *,
        salt: Hashable = (),
        priority: int = DEFAULT_PRIORITY,
        retention: float | None = None,
    ) -> Admission:
        """A sequence with pages for a prompt, sharing the published ones. Its length is the number of hit
        tokens; `commit` says when the others are written.

        The hit is whole pages, and the last token is never part of it: it has to be computed to go on.

        Args:
            tokens: the prompt's ids.
            salt: only prompts of an equal salt share (tenant, adapter, routing policy).
            priority: of its pages against eviction, a higher one is kept longer.
            retention: seconds that the priority holds after the last use, None for ever.

        Raises:
            ExceedsArena: more pages than the arena has; OutOfPages: more than are available besides the hit.
        """
        packed = pack_tokens(tokens)
        num_tokens = len(packed) // 4
        total = -(-num_tokens // self.block_size)
        if total > self.num_pages:
            raise ExceedsArena(total, self.num_pages)
        hit = self._longest_hit(packed[: (num_tokens - 1) // self.block_size * self.block_size * 4], salt)
        references = self._pool.references
        available = self._pool.available - [references[page] for page in hit].count(0)
        if total - len(hit) > available:
            raise OutOfPages(total - len(hit), available)
        self._pool.share(hit)
        hit_tokens = len(hit) * self.block_size
        state = CachedSequence(hit + self._take(total - len(hit)), hit_tokens, num_tokens)
        if self._enable_prefix_caching:
            state.tokens = array("i", packed)
            state.publishable = True
        state.published = len(hit)
        state.salt, state.priority, state.retention = salt, priority, retention
        if hit and priority != DEFAULT_PRIORITY:
            self._prefixes.raise_priority(self._pool.published[hit[-1]], priority, retention)
        self._hit_rate.update(1, num_tokens, hit_tokens)
        return Admission(self._add(state), hit_tokens)

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

    def commit(self, sequence: int, length: int) -> None:
        """Says that the rows of the first `length` tokens are written, and publishes the pages that they
        fill.

        Raises:
            OutOfBounds: that is less than was written, or more than there are pages or known tokens for.
        """
        state = self._state(sequence)
        limit = len(state.tokens) if state.publishable else len(state.table) * self.block_size
        if not state.length <= length <= limit:
            raise OutOfBounds(sequence, length, limit)
        state.length = length
        self._settle(state)

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
        self._prefixes.release(released)
        self._settle(state)
        return released

    def release_before(self, sequence: int, position: int) -> list[int]:
        """Gives back the pages that lie wholly before a position (sliding window), and returns them. Their
        entries in the block table become `NO_PAGE`.

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
                self._prefixes.release((page,))
        return pages

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens. Every page is shared; whoever first writes into the partial
        tail page copies it (`writable_page` copies it at once)."""
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
        self._prefixes.release(state.table)

    # Prefixes

    def match(self, tokens: TokenIds, salt: Hashable = ()) -> int:
        """Tokens of the longest published prefix, in whole pages. Counts as a use of its pages."""
        if type(tokens) is not bytes:
            tokens = pack_tokens(tokens)
        node = self._find(tokens, salt)
        if node is None:
            self._misses += 1
            return 0
        return (node.start + len(node.pages)) * self.block_size

    def match_pages(self, tokens: TokenIds, salt: Hashable = ()) -> list[int]:
        """The pages of the longest published prefix; see `match`."""
        return self._longest_hit(pack_tokens(tokens), salt)

    def evict(self, count: int) -> list[int]:
        """Takes `count` idle pages out of the prefix cache, those worth least first, and frees them.

        Raises:
            OutOfPages: fewer pages are idle.
        """
        if count > self._pool.idle:
            raise OutOfPages(count, self._pool.idle)
        pages: list[int] = []
        while len(pages) < count:
            pages.append(self._prefixes.evict())
        self._pool.free += pages
        return pages

    def reset_prefix_cache(self) -> bool:
        """Forgets every published page; refused (False) while any page is in use."""
        if self.num_used_pages:
            return False
        self._prefixes.clear()
        return True

    def take_events(self) -> list[CacheEvent]:
        """What was stored in and removed from the prefix cache since the last call."""
        return self._prefixes.take_events()

    @property
    def hit_rate(self) -> float:
        """Share of the most recent requests' prompt tokens that were in the prefix cache."""
        return self._hit_rate.rate

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
        if not state.released <= index < len(state.table):
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
            if start < stop and not state.released * self.block_size <= position < capacity:
                raise OutOfBounds(sequence, position, capacity)
        index, offset = np.divmod(np.arange(start, stop), self.block_size)
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
        copy = self._take_one()
        if self._memory:
            self._memory.copy_page(page, copy)
        index = position // self.block_size
        state.table[index] = copy
        state.published = min(state.published, index)
        self._prefixes.release((page,))
        self._copies += 1
        self._settle(state)
        return copy

    # Rows, if the cache has a page memory

    def write(
        self, sequence: int, position: int, keys: npt.ArrayLike, values: npt.ArrayLike, *, layer: int = 0
    ) -> None:
        """Stores the rows of consecutive tokens from `position` on, in pages that are made the sequence's own.

        Args:
            keys, values: `[tokens, num_kv_heads, head_dim]`.

        Raises:
            OutOfBounds: no page is held for some of them. UnrepresentableValue: the format cannot hold a value.
            OutOfPages: a page must be copied and none is available. Nothing is written then.
        """
        memory = self._page_memory()
        self.slot(sequence, position)
        rows = memory.encode_rows(keys, values)
        end = position + rows.shape[1]
        self.slot(sequence, max(position, end - 1))
        for at in self._page_starts(position, end):
            self.writable_page(sequence, at)
        for at in self._page_starts(position, end):
            page, offset = self.slot(sequence, at)
            count = min(self.block_size - offset, end - at)
            memory.write_rows(page, offset, layer, rows[:, at - position : at - position + count])

    def read(self, sequence: int, start: int, stop: int, *, layer: int = 0) -> npt.NDArray[np.float32]:
        """Keys and values of the tokens `start` ... `stop - 1`, float32 `[2, tokens, num_kv_heads, head_dim]`.

        Raises:
            OutOfBounds: some of them are not written, or were given back.
        """
        memory = self._page_memory()
        length = self._state(sequence).length
        if not 0 <= start <= stop <= length:
            raise OutOfBounds(sequence, start if start > length else stop, length)
        slots = self.slot_mapping(sequence, start, stop)
        return memory.read_rows(*np.divmod(slots, self.block_size), layer)

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
            self._prefixes.release((page,))

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
        allocated = sum(pool.generations) - self._pages_moved
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
            defragmentations=self._defragmentations,
            pages_moved=self._pages_moved,
            evictions=self._prefixes.evictions,
            prefix_misses=self._misses,
            evictable_tokens=pool.idle * self.block_size,
            protected_tokens=(sum(node is not None for node in pool.published) - pool.idle) * self.block_size,
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

    def should_defragment(self, threshold: float = 0.3) -> bool:
        """Whether more than this share of the used pages has a hole in front."""
        return self.fragmentation().ratio > threshold

    def defragment(self, max_moves: int | None = None) -> dict[int, int]:
        """Moves pages so that the used ones lie together at the front, at most `max_moves`. See `plan_moves`, also
        for what is returned.

        Block tables change: nobody else may read or write the moved pages meanwhile.
        """
        pool = self._pool
        runs = [state.table for state in self._sequences.values()] + self._prefixes.runs()
        moves = plan_moves(self.num_pages, pool.free, self._pins, runs, max_moves)
        if not moves:
            return moves
        free = bytearray(self.num_pages + 1)
        for page in pool.free:
            free[page] = 1
        for source, destination in moves.items():
            if self._memory:
                self._memory.copy_page(source, destination)
            pool.references[destination] = pool.references[source]
            pool.references[source] = 0
            pool.generations[destination] += 1
            free[source], free[destination] = 1, 0
        for state in self._sequences.values():
            state.table[:] = [moves.get(page, page) for page in state.table]
        self._prefixes.move(moves)
        pool.free = list(itertools.compress(range(self.num_pages, 0, -1), free[:0:-1]))
        self._defragmentations += 1
        self._pages_moved += len(moves)
        return moves

    def check(self) -> None:
        """Proves that the bookkeeping is consistent; linear in the pages, for tests and stress runs.

        Raises:
            CorruptCache: it is not.
        """
        pool = self._pool
        named = [0] * (self.num_pages + 1)
        for state in self._sequences.values():
            if max(state.length, state.reserved) > len(state.table) * self.block_size:
                raise CorruptCache(f"{state.length} tokens do not fit {len(state.table)} pages")
            for page in state.table[state.released :]:
                named[page] += 1
        for page, count in self._pins.items():
            named[page] += count
        free = set(pool.free)
        if len(free) != len(pool.free):
            raise CorruptCache("a page is in the free list twice")
        idle = 0
        for page in range(1, self.num_pages + 1):
            if pool.references[page] != named[page]:
                raise CorruptCache(f"page {page} counts {pool.references[page]} references and has {named[page]}")
            published = pool.published[page] is not None
            idle += published and not named[page]
            if (page in free) != (not named[page] and not published):
                raise CorruptCache(f"page {page} is {'' if page in free else 'not '}in the free list")
        if idle != pool.idle:
            raise CorruptCache(f"{pool.idle} pages are counted as idle and {idle} are")
        problem = self._prefixes.problem()
        if problem:
            raise CorruptCache(problem)

    # Details

    def _page_memory(self) -> KvPageMemory:
        if not isinstance(self._memory, KvPageMemory):
            raise TypeError("this cache has no page memory of its own; give it a KvPageMemory")
        return self._memory

    def _page_starts(self, start: int, stop: int) -> list[int]:
        """The first position of `start` ... `stop - 1` in each of their pages."""
        first = start - start % self.block_size
        return [max(start, at) for at in range(first, stop, self.block_size)]

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

    def _longest_hit(self, tokens: bytes, salt: Hashable) -> list[int]:
        node = self._find(tokens, salt)
        if node is None:
            self._misses += 1
        return self._prefixes.pages_to(node)

    def _is_writable(self, page: int) -> bool:
        pool = self._pool
        return (
            pool.references[page] - self._pins.get(page, 0) == 1
            and pool.published[page] is None
            and not self._prefixes.is_duplicate(page)
        )

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
        """Publishes the pages that are full, and finds out how far appending needs no second look."""
        index, offset = divmod(state.length, self.block_size)
        if state.publishable and index > state.published:
            self._publish(state, index)
        if offset and self._is_writable(state.table[index]):
            # The token that fills a page to be published takes the slow way too.
            state.append_limit = (index + 1) * self.block_size - state.publishable
        else:
            state.append_limit = state.length

    def _publish(self, state: CachedSequence, full: int) -> None:
        """Publishes the pages up to the index `full`. A sequence whose chain is broken publishes no more."""
        first = state.published
        tokens = state.tokens[first * self.block_size : full * self.block_size].tobytes()
        previous = state.table[first - 1] if first else NO_PAGE
        state.publishable = (
            (not first or previous != NO_PAGE)
            and _UNKNOWN_PACKED not in tokens
            and self._prefixes.publish(
                state.salt, previous, tokens, state.table[first:full], state.priority, state.retention
            )
        )
        state.published = full
