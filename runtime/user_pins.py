"""Experts that the user wants in memory, or out of it: what the coordinator does about them.

A pin is a bit of the arena that the coordinator writes and the pager reads before it evicts; the expert is then asked
for as by a worker. So a pin outlives any pager, and what a killed one was loading is loaded by the next.
"""

from __future__ import annotations

from collections.abc import Sequence

from hotset.shm.paging_queue import PagingDirection, PagingMessage, PagingPriority, PagingQueue
from hotset.shm.segment import Segment


class UserPins:
    """Args:
    segment, queue: of the instance.
    limit: how many experts may be pinned; the plan has slots for them beside those that workers may pin.
    """

    def __init__(self, segment: Segment, queue: PagingQueue, limit: int) -> None:
        self.limit = limit
        self._arena = segment.arena
        self._queue = queue
        self._num_layers = segment.layout.geometry.num_layers
        self._num_experts = segment.layout.geometry.num_experts

    def problem(self, layer: int, experts: Sequence[int]) -> str | None:
        """Which of them there is not, in one sentence; None if there are all."""
        if not 0 <= layer < self._num_layers:
            return f"layer is {layer}, expected 0 <= layer < {self._num_layers}"
        for expert in experts:
            if not 0 <= expert < self._num_experts:
                return f"expert id is {expert}, expected 0 <= id < {self._num_experts}"
        return None

    def pin(self, layer: int, experts: Sequence[int]) -> int:
        """Pins all of them and asks for those that are absent, or pins none if there would be more than `limit`;
        how many would be pinned."""
        first = layer * self._num_experts
        wanted = {first + expert for expert in experts}
        pinned = len(wanted.union(self._arena.user_pins()))
        if pinned > self.limit:
            return pinned
        for expert in wanted:
            self._arena.pin_for_user(expert, True)
        # Only now: one that was evicted before its bit was set is found absent by the pager, and loaded again.
        absent = [expert - first for expert in wanted if self._arena.request_urgent(expert)]
        if absent:
            self._queue.send(PagingMessage(layer, absent))  # if it does not fit, the bits are found by a rescan
        return pinned

    def unpin(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._arena.pin_for_user(layer * self._num_experts + expert, False)

    def page_out(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Asks the pager to free the slots of `experts`; those that stay, because they are pinned or because the
        queue has no room. One that a worker is using right now stays too, and is not among them."""
        first = layer * self._num_experts
        pinned = set(self._arena.user_pins())
        free = [expert for expert in dict.fromkeys(experts) if first + expert not in pinned]
        message = PagingMessage(layer, free, PagingDirection.OUT, PagingPriority.NORMAL)
        if free and not self._queue.send(message):
            return list(experts)
        return [expert for expert in experts if first + expert in pinned]

    def pinned(self) -> list[tuple[int, int]]:
        """(layer, expert) of all that are pinned."""
        return [divmod(expert, self._num_experts) for expert in self._arena.user_pins()]

    def count_absent(self) -> int:
        """Pinned experts that are not in memory yet, or cannot be."""
        return sum(self._arena.find(expert) < 0 for expert in self._arena.user_pins())
