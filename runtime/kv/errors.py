"""What the KV cache refuses, with the numbers that say why."""

from __future__ import annotations

from hotset.runtime.errors import HotsetError


class KvCacheError(HotsetError):
    """Base of every refusal of the KV cache. A refused call has changed nothing."""


class OutOfPages(KvCacheError):
    """More pages were asked for than are free or idle. Waiting or preempting a sequence can help."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"{needed} pages are needed and {available} are available")
        self.needed = needed
        self.available = available


class ExceedsArena(OutOfPages):
    """A request needs more pages than the whole arena has: it can never be admitted, so it is refused at once."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(needed, available)
        self.args = (f"{needed} pages are needed and the whole arena has {available}",)


class UnknownSequence(KvCacheError):
    """The sequence was never allocated, or is freed already."""

    def __init__(self, sequence: int) -> None:
        super().__init__(f"there is no sequence {sequence!r}")
        self.sequence = sequence


class OutOfBounds(KvCacheError):
    """A position outside the tokens that a sequence may address."""

    def __init__(self, sequence: int, position: int, allocated: int) -> None:
        super().__init__(f"position {position} of sequence {sequence} is outside its {allocated} tokens")
        self.sequence = sequence
        self.position = position
        self.allocated = allocated


class CorruptCache(KvCacheError):
    """`check()` found the bookkeeping contradicting itself: a defect of the cache, never of its caller."""
