"""The running sequences as their workers find them in the arena: token ids, block tables, committed lengths."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hotset.runtime.instance import Instance
from hotset.runtime.kv.cache import PagedKvCache
from hotset.runtime.kv.page_pool import NO_PAGE
from hotset.runtime.scheduler import Request
from hotset.shm.layout import Section


class ArenaSequences:
    """The coordinator's part of the sections for sequences and pages.

    Args:
        instance: whose arena it is.
        cache: knows the block tables.
    """

    def __init__(self, instance: Instance, cache: PagedKvCache) -> None:
        self._cache = cache
        self._arena = instance.arena
        self._token_ids = instance.segment.view(Section.TOKEN_IDS)
        self._block_tables = instance.segment.block_tables()
        self._pages = instance.segment.view(Section.KV_PAGES)

    def begin(self, request: Request) -> None:
        """A request has got its row: no worker serves it yet, so its committed length is ours to set: rows found in the
        prefix cache.
        """
        self._token_ids[request.row, : request.known] = request.known_ids()
        self._arena.store_u64(Section.SEQUENCES, request.row, 0, request.accounted)
        self.write_block_tables(request)

    def committed(self, request: Request) -> int:
        return self._arena.load_u64(Section.SEQUENCES, request.row, 0)

    def token_ids(self, request: Request, start: int, stop: int) -> npt.NDArray[np.int32]:
        """In the arena itself."""
        return self._token_ids[request.row, start:stop]

    def write_block_tables(self, request: Request, start: int = 0) -> None:
        """The entries from block `start` on."""
        for group, entries in enumerate(self._block_tables[request.row]):
            table = self._cache.block_table(request.sequence, group)
            for page in table[start:]:
                if page != NO_PAGE:
                    self._note_new_owner(page)
            entries[start : len(table)] = table[start:]
        # Release, after the entries: the worker reads the count first.
        self._arena.store_u32(Section.SEQUENCES, request.row, 2, self._cache.num_blocks(request.sequence))

    def clear_behind_windows(self, request: Request) -> None:
        """Its worker reads those pages no more; who reads the row from outside shall not either."""
        for group, window in enumerate(self._cache.windows):
            if window:
                released = self._cache.num_released(request.sequence, group)
                self._block_tables[request.row, group, :released] = NO_PAGE

    def clear_block_tables(self, request: Request) -> None:
        """Before others get its pages: who reads the row from outside must not take their pages for its own."""
        self._arena.store_u32(Section.SEQUENCES, request.row, 2, 0)

    def move_pages(self, moves: Mapping[int, int]) -> None:
        """Copies the bytes of pages, source -> destination, while nobody writes any."""
        for source, destination in moves.items():
            self._note_new_owner(destination)
            self._pages[destination] = self._pages[source]

    def _note_new_owner(self, page: int) -> None:
        """To be called before the new owner can write the page: who still reads it for an old one has to see that."""
        self._arena.hand_out_page(page, self._cache.generation(page) % 2**32)
