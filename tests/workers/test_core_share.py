"""Workers share the cores: who computes alone has all of them, and nobody computes another result for that."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment
from hotset.workers import core_share
from hotset.workers.compute import _kernels
from hotset.workers.core_share import CoreShare


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What the kernels were told, of six cores."""
    told: list[int] = []
    monkeypatch.setattr(core_share.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(_kernels, "set_num_threads", told.append)
    yield told


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.private(Geometry(num_layers=1, num_experts=8, num_processes=5))
    yield segment
    segment.close()


def test_a_worker_that_computes_alone_has_all_cores(segment: Segment, threads: list[int]) -> None:
    shares = [CoreShare(segment.arena, process, 3) for process in range(3)]
    shares[1].take()
    assert threads == [6]


def test_workers_that_compute_at_once_share_them(segment: Segment, threads: list[int]) -> None:
    shares = [CoreShare(segment.arena, process, 3) for process in range(3)]
    for share in shares:
        share.take()
    shares[0].take()
    assert threads == [6, 3, 2, 2]
    shares[1].rest()
    shares[2].rest()
    shares[0].take()
    assert threads[-1] == 6


def test_threads_change_only_when_the_share_does(segment: Segment, threads: list[int]) -> None:
    share = CoreShare(segment.arena, 0, 2)
    for _ in range(3):
        share.take()
        share.rest()
    assert threads == [6]


def test_more_workers_than_cores_compute_with_a_thread_each(
    segment: Segment, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_share.os, "sched_getaffinity", lambda _: {0, 1})
    shares = [CoreShare(segment.arena, process, 4) for process in range(4)]
    for share in shares:
        share.take()
    assert threads == [2, 1, 1, 1]


def test_a_worker_that_was_killed_while_it_computed_counts_until_its_successor_begins(
    segment: Segment, threads: list[int]
) -> None:
    share, killed = (CoreShare(segment.arena, process, 2) for process in range(2))
    killed.take()
    share.take()
    assert threads[-1] == 3
    CoreShare(segment.arena, 1, 2)
    share.take()
    assert threads[-1] == 6
