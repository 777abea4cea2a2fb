"""The order in which a worker gets at the experts of a step."""

from __future__ import annotations

from typing import cast

from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.paging_queue import PagingMessage, PagingQueue
from hotset.shm.segment import Segment
from hotset.workers.expert_access import ExpertAccess


class Sent:
    """In the place of the queue."""

    def __init__(self) -> None:
        self.messages: list[PagingMessage] = []

    def send(self, message: PagingMessage) -> bool:
        self.messages.append(message)
        return True


def load(segment: Segment, slot: int, expert: int) -> None:
    segment.arena.load_begin(slot, expert)
    segment.arena.load_publish(slot, 0, 64, 0, False)


def access_to(pins: int) -> tuple[Segment, ExpertAccess, Sent]:
    """Two layers of eight experts; expert 3 of layer 1 is in slot 0, expert 5 in slot 1."""
    geometry = Geometry(num_layers=2, num_experts=8, pins_per_process=pins, slot_classes=(SlotClass(8, 64),))
    segment, queue = Segment.private(geometry), Sent()
    load(segment, 0, 8 + 3)
    load(segment, 1, 8 + 5)
    return segment, ExpertAccess(segment, cast("PagingQueue", queue), 0), queue


def test_what_is_missing_is_asked_for_before_the_first_resident_expert_is_given() -> None:
    segment, access, queue = access_to(pins=4)
    experts = access.resident(1, [1, 3, 5, 7])
    assert next(experts) == (3, 0)
    assert [message.experts for message in queue.messages] == [[1, 7]]
    assert segment.arena.requested(8 + 7, True)
    assert next(experts) == (5, 1)
    load(segment, 2, 8 + 7)
    load(segment, 3, 8 + 1)
    assert list(experts) == [(1, 3), (7, 2)]
    assert segment.arena.unpin_all(0) == 0


def test_with_few_pins_resident_experts_still_come_before_anything_is_waited_for() -> None:
    segment, access, queue = access_to(pins=2)
    experts = access.resident(1, [1, 3, 5])
    assert [next(experts), next(experts)] == [(3, 0), (5, 1)]
    assert [message.experts for message in queue.messages] == [[1]]
    load(segment, 2, 8 + 1)
    assert list(experts) == [(1, 2)]


def test_experts_that_can_be_used_at_once_come_together_and_stay_pinned_meanwhile() -> None:
    segment, access, _ = access_to(pins=4)
    together = access.resident_together(1, [1, 3, 5, 7])
    assert next(together) == [(3, 0), (5, 1)]
    assert not segment.arena.evict_begin(0) and not segment.arena.evict_begin(1)
    load(segment, 2, 8 + 7)
    load(segment, 3, 8 + 1)
    assert next(together) == [(1, 3), (7, 2)]
    assert segment.arena.evict_begin(0) and segment.arena.evict_begin(1)
    assert list(together) == []
