"""What a KV cache is made of: `CacheConfig`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from hotset.runtime.argument_types import check_field_types
from hotset.runtime.kv.page_memory import KvPageMemory
from hotset.runtime.settings import Settings

MAX_PAGES = 1 << 31
"""More than the memory of any machine has room for; each costs some bytes of bookkeeping."""


@runtime_checkable
class PageMemory(Protocol):
    """Where the rows of the pages lie."""

    @property
    def page_nbytes(self) -> int: ...

    def copy_page(self, source: int, destination: int) -> None: ...

    def clear_pages(self, pages: Sequence[int]) -> None: ...


class CacheConfig(Settings, frozen=True):
    """The arguments of a `PagedKvCache`.

    Attributes:
        num_pages: pages in all; 0 is allowed and serves only empty sequences.
        block_size: tokens per page.
        windows: per group of layers, how many positions a row sees, its own included; 0: all.
        max_step: groups with a window have pages only for so many tokens beyond the written ones, more as the sequence
            grows and `reserve` asks for them; None: for all that are reserved.
        memory: where the rows lie. If given, copies on write reach it, and its pages are cleared before they are
            handed out, so that nobody reads the rows of an earlier owner.
        page_nbytes: bytes of one page, for the memory figures; those of `memory` if that is given.
        enable_prefix_caching: without it nothing is published and every hit is 0.
        hit_rate_window: requests that `hit_rate` looks back.
        events: whether to collect what `take_events` returns.
        clock: seconds, for priorities with a time limit.
    """

    num_pages: int
    block_size: int = 16
    windows: Sequence[int] = (0,)
    max_step: int | None = None
    memory: PageMemory | None = None
    page_nbytes: int = 0
    enable_prefix_caching: bool = True
    hit_rate_window: int = 1000
    events: bool = False
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        check_field_types(self)
        if not 0 <= self.num_pages < MAX_PAGES:
            raise ValueError(f"num_pages is {self.num_pages}, expected at least 0, and fewer than {MAX_PAGES}")
        for name, least in (("block_size", 1), ("max_step", 1), ("page_nbytes", 0), ("hit_rate_window", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if isinstance(self.memory, KvPageMemory):
            if self.num_pages > (held := self.memory.num_pages):
                raise ValueError(
                    f"num_pages is {self.num_pages} and the memory has {held} pages, expected at most as many"
                )
            if self.block_size != (held := self.memory.layout.block_size):
                raise ValueError(
                    f"block_size is {self.block_size} and the pages of the memory hold {held} tokens, expected the same"
                )
        furthest = max(self.windows, key=lambda window: window or math.inf, default=-1)
        if not self.windows or furthest != self.windows[0] or min(self.windows) < 0:
            raise ValueError(f"windows are {tuple(self.windows)}, expected the one that sees furthest (0: all) first")
