"""What the router asks of the pager."""

from __future__ import annotations

import enum

import msgspec


class PagingDirection(enum.Enum):
    IN = "in"
    OUT = "out"


class PagingPriority(enum.IntEnum):
    """Larger is more important, so that the largest is served first."""

    PREFETCH = 0
    NORMAL = 1
    URGENT = 2


class PagingRequest(msgspec.Struct, frozen=True):
    """One expert of one layer, to be brought into memory or taken out."""

    expert: int
    layer: int
    direction: PagingDirection
    priority: PagingPriority

    @classmethod
    def page_in_urgent(cls, expert: int, layer: int = 0) -> PagingRequest:
        """A token waits for the expert."""
        return cls(expert, layer, PagingDirection.IN, PagingPriority.URGENT)

    @classmethod
    def prefetch(cls, expert: int, layer: int = 0) -> PagingRequest:
        """A token may want the expert soon."""
        return cls(expert, layer, PagingDirection.IN, PagingPriority.PREFETCH)

    @classmethod
    def page_out(cls, expert: int, layer: int = 0) -> PagingRequest:
        return cls(expert, layer, PagingDirection.OUT, PagingPriority.NORMAL)
