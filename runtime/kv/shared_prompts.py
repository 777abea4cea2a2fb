"""Prompts that begin alike share the pages of their beginning."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from hotset.runtime.argument_types import fitting, integer
from hotset.runtime.kv.block_tables import BlockTables
from hotset.runtime.kv.config import CacheConfig
from hotset.runtime.kv.errors import ExceedsArena, OutOfBounds, OutOfPages
from hotset.runtime.kv.events import CacheEvent
from hotset.runtime.kv.page_pool import NO_PAGE
from hotset.runtime.kv.prefix_cache import PrefixCache, TokenIds, pack_tokens
from hotset.runtime.kv.prefix_eviction import DEFAULT_PRIORITY
from hotset.runtime.kv.sequence import CachedSequence
from hotset.runtime.kv.statistics import HitRateWindow

# UNKNOWN_TOKEN packed. Occurs in packed ids, at whatever alignment, only if one is negative: the others have a top
# byte below 0x80.
_UNKNOWN_PACKED = b"\xff" * 4


class Admission(NamedTuple):
    """A sequence with pages for a prompt; the rows of its first `hit_tokens` tokens were in the cache."""

    sequence: int
    hit_tokens: int


class SharedPrompts(BlockTables):
    """Block tables with a prefix cache; `PagedKvCache`, which everybody uses, is made of this."""

    def __init__(self, config: CacheConfig) -> None:
        super().__init__(config)
        self._enable_prefix_caching = config.enable_prefix_caching
        self._prefixes = PrefixCache(
            self._pool, 4 * config.block_size, config.clock, config.events, len(config.windows)
        )
        self._find = self._prefixes.find
        self._hit_rate = HitRateWindow(config.hit_rate_window)
        self._misses = 0

    # Prompts

    def admit(
        self,
        tokens: TokenIds,
        *,
        salt: Hashable = (),
        priority: int = DEFAULT_PRIORITY,
        retention: float | None = None,
    ) -> Admission:
        """A sequence with pages for a prompt, sharing the published ones. Its length is the number of hit tokens;
        `commit` says when the others are written.

        The hit is whole pages, and the last token is never part of it: it has to be computed to go on.

        Args:
            tokens: the prompt's ids.
            salt: only prompts of an equal salt share (tenant, adapter, routing policy).
            priority: of its pages against eviction, a higher one is kept longer.
            retention: seconds that the priority holds after the last use, None for ever.

        Raises:
            ExceedsArena: more pages than the arena has; OutOfPages: more than are available besides the hit.
        """
        if priority != DEFAULT_PRIORITY or retention is not None:
            priority, retention = integer("priority", priority), fitting("retention", retention, float | None)
        packed = pack_tokens(tokens)
        num_tokens = len(packed) // 4
        hit = self._longest_hit(packed[: (num_tokens - 1) // self.block_size * self.block_size * 4], salt)
        tables = self._hit_tables(hit)
        hit = tables[0]
        hit_tokens = len(hit) * self.block_size
        state = CachedSequence(tables, hit_tokens, num_tokens)
        missing = sum(self._missing(state, num_tokens, hit_tokens))
        shared = [page for table in tables for page in table]
        total = missing + len(shared) - shared.count(NO_PAGE)
        if total > self.num_pages:
            raise ExceedsArena(total, self.num_pages)
        references = self._pool.references
        available = self._pool.available - [references[page] for page in shared].count(0)
        if missing > available:
            raise OutOfPages(missing, available)
        hit_end = hit[-1] if hit else NO_PAGE
        self._pool.share(shared)
        self._cover(state, num_tokens, hit_tokens)
        state.released = [table.count(NO_PAGE) for table in tables]
        if self._enable_prefix_caching:
            state.tokens = array("i", packed)
            state.publishable = True
        state.published = hit_tokens // self.block_size
        state.salt, state.priority, state.retention = salt, priority, retention
        if hit_end and priority != DEFAULT_PRIORITY:
            self._prefixes.raise_priority(self._pool.published[hit_end], priority, retention)
        self._move_windows(state)
        self._hit_rate.update(1, num_tokens, hit_tokens)
        return Admission(self._add(state), hit_tokens)

    def commit(self, sequence: int, length: int) -> None:
        """Says that the rows of the first `length` tokens are written, and publishes the pages that they fill.

        Raises:
            OutOfBounds: that is less than was written, or more than there are pages or known tokens for.
        """
        state = self._state(sequence)
        if type(length) is not int:
            length = integer("length", length)
        limit = min(map(len, state.tables)) * self.block_size
        if state.publishable:
            limit = min(limit, len(state.tokens))
        if not state.length <= length <= limit:
            raise OutOfBounds(sequence, length, limit)
        state.length = length
        self._settle(state)
        self._move_windows(state)

    def match(self, tokens: TokenIds, salt: Hashable = ()) -> int:
        """Tokens of the longest published prefix, in whole pages. Counts as a use of its pages.

        Every group without a window has all its pages then, and one with a window those that the next token sees.
        """
        if type(tokens) is not bytes:
            tokens = pack_tokens(tokens)
        node = self._find(tokens, salt)
        if node is None:
            self._misses += 1
            return 0
        if len(self.windows) > 1:
            return len(self._hit_tables(self._prefixes.pages_to(node))[0]) * self.block_size
        return (node.start + len(node.pages)) * self.block_size

    def match_pages(self, tokens: TokenIds, salt: Hashable = ()) -> list[int]:
        """The pages that the first group has for the longest published prefix; see `match`."""
        return self._hit_tables(self._longest_hit(pack_tokens(tokens), salt))[0]

    # Published pages

    def evict(self, count: int) -> list[int]:
        """Takes `count` idle pages out of the prefix cache, those worth least first, frees and returns them. They are
        more only if pages become unreachable with them.

        Raises:
            OutOfPages: fewer pages are idle.
        """
        pool, evict = self._pool, self._prefixes.evict
        count = integer("count", count, 0)
        if count > pool.idle:
            raise OutOfPages(count, pool.idle)
        free = pool.free
        before = len(free)
        while len(free) < before + count:
            free.append(evict())
        return free[before:]

    def reset_prefix_cache(self) -> bool:
        """Forgets every published page; refused (False) while any page is in use."""
        if self._pool.available < self.num_pages:
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

    # Details

    def _release(self, pages: Sequence[int], group: int = 0) -> None:
        if group:
            self._prefixes.release_windowed(pages)
        else:
            self._prefixes.release(pages)

    def _is_writable(self, page: int) -> bool:
        return self._pool.is_writable(page) and not self._prefixes.is_duplicate(page)

    def _settle(self, state: CachedSequence) -> None:
        full = state.length // self.block_size
        if state.publishable and full > state.published:
            self._publish(state, full)
        super()._settle(state)

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
        if state.publishable:
            owners = self._prefixes.originals(state.table[first:full])
            for group, table in enumerate(state.tables[1:], 1):
                self._prefixes.windowed.publish(group, owners, table[first:full])

    def _hit_tables(self, hit: list[int]) -> list[list[int]]:
        """Block tables of all groups for the longest beginning of `hit`, which are pages of the first group, at whose
        end no group lacks a page that the next token sees. Before its window a group has `NO_PAGE`.
        """
        if len(self.windows) == 1:
            return [hit]
        found = [self._prefixes.windowed.pages(group, hit) for group in range(1, len(self.windows))]
        blocks = len(hit)
        while True:
            firsts = self._first_blocks(blocks * self.block_size)[1:]
            # The last block that is missing inside a window: no prefix that is longer can be used.
            lacking = [
                index
                for first, table in zip(firsts, found, strict=True)
                for index in range(blocks - 1, first - 1, -1)
                if table[index] == NO_PAGE
            ]
            if not lacking:
                break
            blocks = max(lacking)
        return [hit[:blocks]] + [
            [NO_PAGE] * first + table[first:blocks] for first, table in zip(firsts, found, strict=True)
        ]

    def _longest_hit(self, tokens: bytes, salt: Hashable) -> list[int]:
        node = self._find(tokens, salt)
        if node is None:
            self._misses += 1
        return self._prefixes.pages_to(node)
