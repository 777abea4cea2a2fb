"""What users ask about experts that stay in memory or leave it, answered by whoever keeps the arena."""

from __future__ import annotations

from hotset.runtime.messages.client import ExpertsPagedOut, ExpertsPinned, PageOutExperts, PinExperts, UnpinExperts
from hotset.runtime.user_pins import UserPins

UserPinRequest = PinExperts | UnpinExperts | PageOutExperts


def answer(pins: UserPins, request: UserPinRequest) -> ExpertsPinned | ExpertsPagedOut:
    """Of a request in which `UserPins.problem` finds none."""
    match request:
        case PinExperts(query, layer, experts):
            return ExpertsPinned(query, pins.pin(layer, experts))
        case UnpinExperts(query, layer, experts):
            pins.unpin(layer, experts)
            return ExpertsPinned(query, len(pins.pinned()))
        case PageOutExperts(query, layer, experts):
            return ExpertsPagedOut(query, pins.page_out(layer, experts))
