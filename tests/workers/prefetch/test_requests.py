"""How long the pager holds a prefetch for worth something."""

from __future__ import annotations

import pytest

from hotset.shm.geometry import Geometry
from hotset.shm.layout import PrefetchSource, Section
from hotset.shm.segment import Segment
from hotset.workers.prefetch.requests import PrefetchRequests


@pytest.fixture
def segment() -> Segment:
    return Segment.private(Geometry(num_layers=2, num_experts=8))


def route(segment: Segment, layer: int) -> None:
    epoch = segment.arena.load_u64(Section.LAYERS, layer, 0)
    segment.arena.store_u64(Section.LAYERS, layer, 0, epoch + 1)


def test_the_latest_is_taken_first_and_named_once(segment: Segment) -> None:
    requests = PrefetchRequests(segment.arena, 8, 1)
    requests.note([3, 4], PrefetchSource.AFFINITY)
    requests.note([9], PrefetchSource.GATE_AHEAD)
    requests.repair([3, 4, 9, 10])
    taken = [requests.take()[:2] for _ in range(4)]
    assert taken == [
        (10, PrefetchSource.NONE),
        (9, PrefetchSource.GATE_AHEAD),
        (4, PrefetchSource.AFFINITY),
        (3, PrefetchSource.AFFINITY),
    ]
    assert not requests


def test_who_asks_again_is_not_taken_for_who_asked_before(segment: Segment) -> None:
    """A request that was answered otherwise, by a load that somebody waited for, is still known here."""
    requests = PrefetchRequests(segment.arena, 8, 1)
    requests.note([9], PrefetchSource.AFFINITY)
    requests.note([10], PrefetchSource.AFFINITY)
    route(segment, 1)
    requests.note([9], PrefetchSource.GATE_AHEAD)
    assert requests.take() == (9, PrefetchSource.GATE_AHEAD, 1)
    assert requests.take() == (10, PrefetchSource.AFFINITY, None)
    assert not requests


def test_a_message_says_whose_request_it_was_that_a_rescan_had_found(segment: Segment) -> None:
    requests = PrefetchRequests(segment.arena, 8, 1)
    requests.repair([9])
    requests.note([9], PrefetchSource.TRANSITIONS)
    assert requests.take() == (9, PrefetchSource.TRANSITIONS, 0)
    assert not requests


@pytest.mark.parametrize("workers", [1, 3])
def test_a_request_is_stale_when_every_worker_may_have_passed_its_layer(segment: Segment, workers: int) -> None:
    requests = PrefetchRequests(segment.arena, 8, workers)
    for routed in range(workers + 1):
        requests.note([9], PrefetchSource.GATE_AHEAD)
        for _ in range(routed):
            route(segment, 1)
        route(segment, 0)  # another layer changes nothing
        assert (requests.take()[2] is not None) == (routed < workers)


def test_what_was_begun_is_awaited_until_its_layer_has_been_routed(segment: Segment) -> None:
    requests = PrefetchRequests(segment.arena, 8, 1)
    requests.note([3, 9], PrefetchSource.GATE_AHEAD)
    for _ in range(2):
        expert, _, epoch = requests.take()
        assert epoch is not None
        requests.begin(expert, epoch)
    assert requests.awaited() == {3, 9}
    route(segment, 1)
    assert requests.awaited() == {3}


def test_what_came_too_late_is_given_back(segment: Segment) -> None:
    requests = PrefetchRequests(segment.arena, 8, 1)
    requests.note([3, 9], PrefetchSource.GATE_AHEAD)
    assert requests.take_stale() == []
    route(segment, 0)
    requests.note([4], PrefetchSource.GATE_AHEAD)
    assert requests.take_stale() == [3]
    assert [requests.take()[0] for _ in range(2)] == [4, 9]
