"""The paged KV cache: block tables whose full pages are shared by content.

Single-threaded bookkeeping. Where the rows themselves lie is somebody else's: the coordinator's pages lie in the
shared arena and its workers write them; a program that embeds only the cache attaches a `KvPageMemory`.

In the order in which one builds on the other: `SequenceTables`, what is known of the sequences; `BlockTables`, how they
grow, fork and end; `SharedPrompts`, the prefix cache; and here rows, figures and upkeep.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import fitting, integer, integers
from hotset.runtime.kv import statistics
from hotset.runtime.kv.compaction import plan_moves
from hotset.runtime.kv.config import CacheConfig
from hotset.runtime.kv.errors import CorruptCache, OutOfBounds, OutOfPages
from hotset.runtime.kv.layer_groups import pages_of_sequence
from hotset.runtime.kv.page_memory import KvPageMemory
from hotset.runtime.kv.shared_prompts import SharedPrompts
from hotset.runtime.kv.statistics import FragmentationStats, PagedCacheStats
from hotset.runtime.settings import check_settings

MAX_TOKENS = 1 << 31
"""More than any sequence has: the capacity of a cache whose layers all have windows."""


class PagedKvCache(SharedPrompts):
    """Block tables with a prefix cache, statistics and compaction.

    Prompts whose token ids are given to `admit` share the full pages that they have in common with earlier ones of the
    same salt. A page is published (can be found) when all its tokens are committed; published pages that nobody uses
    any more are kept until their room is needed.

    Args:
        num_pages, block_size, options: the fields of `CacheConfig`.
    """

    def __init__(self, num_pages: int, block_size: int = 16, **options: Any) -> None:
        check_settings(options, type(self).__name__, CacheConfig)
        config = CacheConfig(num_pages, block_size, **options)
        super().__init__(config)
        self.page_nbytes = config.memory.page_nbytes if config.memory else config.page_nbytes
        self._defragmentations = self._pages_moved = 0

    # Rows, if the cache has a page memory

    def write(
        self,
        sequence: int,
        position: int,
        keys: npt.ArrayLike,
        values: npt.ArrayLike,
        *,
        layer: int = 0,
        group: int = 0,
    ) -> None:
        """Stores the rows of consecutive tokens from `position` on, in pages that are made the sequence's own.

        Args:
            keys, values: `[tokens, num_kv_heads, head_dim]`.
            layer: among those of the group.

        Raises:
            OutOfBounds: no page is held for some of them. UnrepresentableValue: the format cannot hold a value.
            OutOfPages: a page must be copied and none is available. Nothing is written then.
        """
        memory = self._page_memory()
        self.slot(sequence, position, group)
        memory.check_layer(layer)
        rows = memory.encode_rows(keys, values)
        end = position + rows.shape[1]
        self.slot(sequence, max(position, end - 1), group)
        starts = self._page_starts(position, end)
        state = self._state(sequence)
        copies = sum(len(self._shared_at(state, at // self.block_size)) for at in starts)
        if copies > self._pool.available:
            raise OutOfPages(copies, self._pool.available)
        for at in starts:
            page = self.writable_page(sequence, at, group)
            offset = at % self.block_size
            count = min(self.block_size - offset, end - at)
            memory.write_rows(page, offset, layer, rows[:, at - position : at - position + count])

    def read(self, sequence: int, start: int, stop: int, *, layer: int = 0, group: int = 0) -> npt.NDArray[np.float32]:
        """Keys and values of the tokens `start` ... `stop - 1`, float32 `[2, tokens, num_kv_heads, head_dim]`.

        Raises:
            OutOfBounds: some of them are not written, or were given back.
        """
        memory = self._page_memory()
        memory.check_layer(layer)
        length = self._state(sequence).length
        start, stop = integer("start", start), integer("stop", stop)
        if not 0 <= start <= stop <= length:
            raise OutOfBounds(sequence, start if start > length else stop, length)
        slots = self.slot_mapping(sequence, start, stop, group)
        return memory.read_rows(*np.divmod(slots, self.block_size), layer)

    # Pages

    def pin(self, pages: Sequence[int]) -> None:
        """Keeps pages where they are, with their bytes, until `unpin`: neither eviction nor compaction takes them."""
        self._pool.pin(integers("pages", pages))

    def unpin(self, pages: Sequence[int]) -> None:
        """Takes back one `pin` of the same pages."""
        pages = integers("pages", pages)
        self._pool.unpin(pages)
        for page in pages:
            self._release((page,), int(page in self._prefixes.windowed))

    def references(self, page: int) -> int:
        """Block tables that name the page + its pins."""
        try:
            return self._pool.references[page]
        except (TypeError, IndexError):
            integer("page", page, 0, self.num_pages)
            raise

    def generation(self, page: int) -> int:
        """How often the page was handed out: who kept an older number must not take its bytes for the old ones."""
        try:
            return self._pool.generations[page]
        except (TypeError, IndexError):
            integer("page", page, 0, self.num_pages)
            raise

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

    def pages_for(self, num_tokens: int) -> int:
        """The most pages that one sequence holds at a time while it grows to `num_tokens` tokens."""
        num_tokens = integer("num_tokens", num_tokens, 0)
        return pages_of_sequence(self.windows, num_tokens, self.block_size, self.max_step)

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest sequence that there is room for."""
        blocks = range(MAX_TOKENS // self.block_size)
        return (
            bisect.bisect_right(blocks, self.num_pages, key=lambda count: self.pages_for(count * self.block_size)) - 1
        ) * self.block_size

    @property
    def memory_nbytes(self) -> int:
        """Bytes of all pages."""
        return self.num_pages * self.page_nbytes

    @property
    def memory_used_nbytes(self) -> int:
        """Bytes of the pages in use."""
        return self.num_used_pages * self.page_nbytes

    # Statistics and upkeep

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
        return statistics.fragmentation(
            self._pool.free,
            self.num_pages,
            self.block_size,
            [(table, state.length) for state in self._sequences.values() for table in state.tables],
            itertools.chain(*self._prefixes.runs(), self._prefixes.windowed.all_pages()),
        )

    def contiguity(self, sequence: int) -> float:
        """1.0 if the pages of the sequence are one ascending run, 0.0 if no two neighbours are."""
        return statistics.contiguity(self._state(sequence).table)

    def should_defragment(self, threshold: float = 0.3) -> bool:
        """Whether more than this share of the used pages has a hole in front."""
        return self.fragmentation().ratio > fitting("threshold", threshold, float)

    def defragment(self, max_moves: int | None = None) -> dict[int, int]:
        """Moves pages so that the used ones lie together at the front, at most `max_moves`. See `plan_moves`, also for
        what is returned.

        Block tables change: nobody else may read or write the moved pages meanwhile.
        """
        if max_moves is not None:
            max_moves = integer("max_moves", max_moves, 0)
        pool = self._pool
        tables = [table for state in self._sequences.values() for table in state.tables]
        runs = tables + self._prefixes.runs()
        moves = plan_moves(self.num_pages, pool.free, pool.pins, runs, max_moves)
        if not moves:
            return moves
        if self._memory:
            for source, destination in moves.items():
                self._memory.copy_page(source, destination)
        pool.move(moves)
        for table in tables:
            table[:] = [moves.get(page, page) for page in table]
        self._prefixes.move(moves)
        self._defragmentations += 1
        self._pages_moved += len(moves)
        return moves

    def check(self) -> None:
        """Proves that the bookkeeping is consistent; linear in the pages, for tests and stress runs.

        Raises:
            CorruptCache: it is not.
        """
        for sequence, state in self._sequences.items():
            if any(self._missing(state, max(state.reserved, state.length), 0)) or state.length > (
                min(map(len, state.tables)) * self.block_size
            ):
                raise CorruptCache(f"the block tables of sequence {sequence} do not hold what it reserved")
        tables = [
            table[released:]
            for state in self._sequences.values()
            for table, released in zip(state.tables, state.released, strict=True)
        ]
        problem = self._pool.problem(tables) or self._prefixes.problem()
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
