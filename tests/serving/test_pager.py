"""A pager process on an arena of its own, with this process in the place of its only worker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from instances import wait_until
from model_factory import make_model

from hotset.runtime.config import BackendConfig
from hotset.runtime.instance import Instance
from hotset.runtime.messages import FromPager, PagerReady, StartPager, StopWorking
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.runtime.supervision import Child
from hotset.shm.counters import Counter
from hotset.shm.layout import COUNTERS_PER_PROCESS, Section, SlotState
from hotset.shm.paging_queue import PagingDirection, PagingMessage, PagingPriority, PagingQueue
from hotset.shm.segment import new_instance_name
from hotset.workers.expert_access import ExpertAccess

WORKER = 0


class PagerAlone:
    """Experts of 6 MiB, so that a kill meets some that are half loaded; eight slots, four lanes."""

    def __init__(self, folder: Path) -> None:
        self.config = BackendConfig(model=str(folder), workers=1, expert_budget="50%", max_num_seqs=1)
        model = ModelConfig.load(folder)
        self.checkpoint = Checkpoint.open(folder, model)
        self.plan = plan_instance(self.config, model, self.checkpoint)
        self.instance = Instance(new_instance_name(), self.plan)
        self.arena = self.instance.arena
        self.queue = PagingQueue.attach(self.instance.name)
        self.access = ExpertAccess(self.instance.segment, self.queue, WORKER)
        self.start()

    def start(self) -> None:
        self.child: Child[FromPager] = Child("hotset.workers.pager", FromPager)
        start = StartPager(self.instance.name, self.plan, self.config, self.plan.pager_process)
        self.child.channel.send(start)
        assert isinstance(self.child.channel.wait(), PagerReady)

    def kill(self) -> None:
        self.child.kill()
        self.child.reap()

    def close(self) -> None:
        self.child.channel.send(StopWorking())
        self.child.reap(10)
        self.queue.close()
        self.instance.remove()

    def loading(self) -> list[int]:
        """Experts in LOADING slots."""
        words = [self.arena.slot(slot) for slot in range(self.plan.geometry.num_slots)]
        return [expert for _, expert, state in words if state == SlotState.LOADING]

    def has_the_right_bytes(self, expert: int) -> bool:
        slot = self.arena.find(expert)
        location = self.checkpoint.expert(0, expert)
        expected = [np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset) for part in location.parts]
        memory = self.instance.segment.view(Section.EXPERT_SLOTS)[slot]
        return slot >= 0 and np.array_equal(memory[: location.nbytes], np.concatenate(expected))

    def count(self, counter: Counter) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self.arena.counter_totals(totals)
        return int(totals[counter])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder, num_layers=1, num_experts=16, experts_per_token=4, hidden_size=1024, num_heads=8,
                      num_kv_heads=8, intermediate_size=1024)  # fmt: skip


@pytest.fixture
def pager(folder: Path) -> Iterator[PagerAlone]:
    pager = PagerAlone(folder)
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


def test_a_page_out_frees_the_slot_unless_the_expert_is_in_use(pager: PagerAlone) -> None:
    for _ in pager.access.resident(0, [3, 4]):
        pass
    pager.arena.want(WORKER, 0, 4)
    pager.queue.send(PagingMessage(0, [3, 4], PagingDirection.OUT, PagingPriority.NORMAL))
    assert wait_until(lambda: pager.arena.find(3) < 0)
    assert pager.arena.find(4) >= 0
    assert pager.count(Counter.PAGE_OUTS) == 1
