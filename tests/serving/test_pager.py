"""A pager process with this process in the place of its only worker: loads, kills, prefetches and page-outs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from instances import wait_until
from model_factory import make_model
from pager_alone import WORKER, PagerAlone

from hotset.shm.counters import Counter
from hotset.shm.paging_queue import PagingDirection, PagingMessage, PagingPriority


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder, num_layers=1, num_experts=16, experts_per_token=4, hidden_size=1024, num_heads=8,
                      num_kv_heads=8, intermediate_size=1024)  # fmt: skip


@pytest.fixture
def pager(folder: Path) -> Iterator[PagerAlone]:
    pager = PagerAlone(folder, warm_start=False)
    yield pager
    pager.close()


def test_every_expert_arrives_with_its_own_bytes(pager: PagerAlone) -> None:
    for expert, _ in pager.access.resident(0, range(16)):
        assert pager.has_the_right_bytes(expert)
    assert pager.count(Counter.URGENT_PAGE_INS) == 16
    assert pager.count(Counter.FAILED_LOADS) == 0


def test_a_pager_killed_with_several_loads_in_flight_loses_none(pager: PagerAlone) -> None:
    interrupted = 0
    for first in (0, 4, 8, 12) * 5:
        wanted = range(first, first + 4)
        for pin, expert in enumerate(wanted):
            pager.arena.want(WORKER, pin, expert)
            pager.arena.request_urgent(expert)
        pager.queue.send(PagingMessage(0, list(wanted)))
        deadline = time.monotonic() + 5
        while len(pager.loading()) < 2 and time.monotonic() < deadline:
            if all(pager.arena.find(expert) >= 0 for expert in wanted):
                break  # too fast for us, this time
        pager.kill()
        interrupted += len(pager.loading()) >= 2
        pager.start()
        assert wait_until(lambda wanted=wanted: all(pager.arena.find(expert) >= 0 for expert in wanted))
        assert all(pager.has_the_right_bytes(expert) for expert in wanted)
        assert pager.loading() == []
        pager.arena.unpin_all(WORKER)
        if interrupted == 3:
            return
    assert interrupted, "no kill met two loads in flight"


def test_an_urgent_request_for_what_is_prefetched_is_answered_once(pager: PagerAlone) -> None:
    for expert in range(8):
        assert pager.arena.request_prefetch(expert)
        pager.queue.send(PagingMessage(0, [expert], priority=PagingPriority.PREFETCH))
        assert [found for found, _ in pager.access.resident(0, [expert])] == [expert]
        assert pager.has_the_right_bytes(expert)
    assert wait_until(lambda: not pager.arena.prefetch_requests())
    loads = pager.count(Counter.URGENT_PAGE_INS) + pager.count(Counter.PREFETCH_PAGE_INS)
    assert loads == 8


def test_an_expert_whose_prefetch_failed_can_still_be_had(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (weights,) = damaged.glob("*.safetensors")
    pager = PagerAlone(damaged, warm_start=False)
    try:
        content = weights.read_bytes()
        os.truncate(weights, 4096)
        assert pager.arena.request_prefetch(3)
        pager.queue.send(PagingMessage(0, [3], priority=PagingPriority.PREFETCH))
        assert wait_until(lambda: pager.count(Counter.FAILED_LOADS) == 1)
        weights.write_bytes(content)
        assert [expert for expert, _ in pager.access.resident(0, [3])] == [3]
        assert pager.has_the_right_bytes(3)
    finally:
        pager.close()


def test_a_prefetch_that_somebody_comes_to_wait_for_is_not_given_up_for_others(folder: Path) -> None:
    pager = PagerAlone(folder, warm_start=False, read_lanes=1)  # which has enough to do with two loads
    try:
        met = 0
        for turn in range(200):
            prefetched = turn % 12
            wanted = [14, 15, prefetched]
            pager.arena.request_prefetch(prefetched)
            pager.queue.send(PagingMessage(0, [prefetched], priority=PagingPriority.PREFETCH))
            # It is read in milliseconds, which we may have slept through.
            assert wait_until(
                lambda prefetched=prefetched: pager.loading() or pager.arena.find(prefetched) >= 0, pause=0
            )
            for pin, expert in enumerate(wanted):
                pager.arena.want(WORKER, pin, expert)
                pager.arena.request_urgent(expert)
            pager.queue.send(PagingMessage(0, wanted))
            met += prefetched in pager.loading()
            assert wait_until(lambda wanted=wanted: all(pager.arena.find(expert) >= 0 for expert in wanted))
            pager.arena.unpin_all(WORKER)
            pager.queue.send(PagingMessage(0, wanted, PagingDirection.OUT, PagingPriority.NORMAL))
            assert wait_until(lambda wanted=wanted: all(pager.arena.find(expert) < 0 for expert in wanted))
            if met == 3:
                break
        assert met, "nobody came in time"
        assert pager.count(Counter.PREFETCH_DROPPED) == 0
    finally:
        pager.close()


def test_a_page_out_frees_the_slot_unless_the_expert_is_in_use(pager: PagerAlone) -> None:
    for _ in pager.access.resident(0, [3, 4]):
        pass
    pager.arena.want(WORKER, 0, 4)
    pager.queue.send(PagingMessage(0, [3, 4], PagingDirection.OUT, PagingPriority.NORMAL))
    assert wait_until(lambda: pager.arena.find(3) < 0)
    assert pager.arena.find(4) >= 0
    assert pager.count(Counter.PAGE_OUTS) == 1
