"""The errors of an expert cache: each is one sentence, and carries its numbers."""

from __future__ import annotations

from hotset.runtime.errors import HotsetError


class ExpertCacheError(HotsetError):
    """The cache could not start, or there is none of this name."""


class ExpertCacheClosed(ExpertCacheError):
    """The cache was closed, here or by its owner, or its owner is gone."""


class ExpertCacheFull(ExpertCacheError):
    """As many processes use the cache as it was made for."""

    def __init__(self, name: str, processes: int) -> None:
        super().__init__(
            f"the expert cache {name!r} is used by {processes} processes already, for which it was made; make it with "
            "a larger processes=..."
        )
        self.processes = processes


class NotEnoughPins(HotsetError):
    """A process pins more experts at once than it has pins."""

    def __init__(self, needed: int, free: int, pins: int) -> None:
        super().__init__(
            f"{needed} experts are to be pinned, but {free} of the {pins} pins of this process are free; pin fewer at "
            "a time, or make the cache with a larger pins_per_process=..."
        )
        self.needed = needed
        self.free = free
