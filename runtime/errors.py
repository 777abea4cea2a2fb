"""The errors that reach a user of `Backend`: each is one sentence, and carries its numbers."""

from __future__ import annotations


class HotsetError(Exception):
    """Base of everything that hotset raises on purpose."""


class BackendError(HotsetError):
    """The backend could not start, or is not running any more."""


class BudgetTooSmall(BackendError):
    """The expert budget gives `slots` slots; `needed` of `nbytes` together are the least that cannot deadlock, because
    of what `reasons` names."""

    def __init__(self, given: str, slots: int, needed: int, nbytes: int, reasons: str) -> None:
        super().__init__(
            f"the expert budget {given} holds {slots} experts, but at least {needed} are needed ({nbytes} bytes), for "
            f"{reasons}; give a larger budget, or less of those"
        )
        self.slots = slots
        self.needed = needed


class MemoryTooSmall(BackendError):
    """`memory` cannot hold `needed` bytes: all that is not experts, and the `slots` least that cannot deadlock, because
    of what `reasons` names."""

    def __init__(self, given: str | int, needed: int, slots: int, reasons: str) -> None:
        super().__init__(
            f"memory is {given}, expected at least {-(-needed >> 20)}MiB ({needed}) for the processes, the dense "
            f"weights, the KV pages and the {slots} experts that must fit, for {reasons}; give more memory, less of "
            "those or a smaller kv_cache_memory"
        )
        self.given = given
        self.needed = needed


class TooManyPins(HotsetError):
    """The user pins more experts than the instance keeps slots for."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(
            f"{needed} experts would be pinned, but the instance was started with user_pins={available}; unpin some, "
            "or start it with more"
        )
        self.needed = needed
        self.available = available


class RequestFailed(HotsetError):
    """A request ended without an answer; the message says why."""


class RequestTooLong(RequestFailed):
    """A request that can never fit: `needed` tokens against a limit of `available`."""

    def __init__(self, needed: int, available: int, what: str) -> None:
        super().__init__(f"the request needs {needed} tokens, but {what} holds {available}")
        self.needed = needed
        self.available = available
