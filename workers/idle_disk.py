"""How much of the time urgent loads leave the disk alone: what prefetching may use."""

from __future__ import annotations

import math
import time

MEMORY_SECONDS = 0.25  # of the moving average
LEAST_IDLE_SHARE = 0.25  # below, urgent loads come so close together that a prefetch would mostly delay them


class IdleDisk:
    """A moving average of the share of time in which no urgent load was under way."""

    def __init__(self) -> None:
        self._busy = False
        self._idle_share = 1.0
        self._updated = time.monotonic()

    def note(self, *, busy: bool) -> None:
        """Whether an urgent load is under way from now on."""
        if busy == self._busy:
            return  # it is averaged over when it ends, or when somebody asks
        self._advance()
        self._busy = busy

    def _advance(self) -> None:
        now = time.monotonic()
        old = math.exp((self._updated - now) / MEMORY_SECONDS)
        self._idle_share = old * self._idle_share + (1 - old) * (not self._busy)
        self._updated = now

    def is_idle(self) -> bool:
        """Whether no urgent load is under way, and few were lately."""
        self._advance()
        return not self._busy and self._idle_share >= LEAST_IDLE_SHARE
