"""A pager process on an arena of its own, with this process in the place of its only worker and of its coordinator."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from hotset.runtime.channel import ChannelClosed
from hotset.runtime.config import BackendConfig
from hotset.runtime.instance import Instance
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.messages.pager import FromPager, PagerReady, StartPager
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.runtime.supervision import Child
from hotset.shm.counters import Counter
from hotset.shm.layout import COUNTERS_PER_PROCESS, SlotState
from hotset.shm.paging_queue import PagingQueue
from hotset.shm.segment import new_instance_name
from hotset.workers.expert_access import ExpertAccess

WORKER = 0


class PagerAlone:
    """Experts of 6 MiB, so that a kill meets some that are half loaded; eight slots, four lanes."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        settings = {"workers": 1, "expert_budget": "50%", "max_num_seqs": 1} | settings
        self.config = BackendConfig(model=str(folder), **settings)
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
        self.child.channel.send(StartPager.of(self.instance.name, self.plan, self.config))
        assert isinstance(self.child.channel.wait(), PagerReady)

    def kill(self) -> None:
        self.child.kill()
        self.child.reap()

    def close(self) -> None:
        with contextlib.suppress(ChannelClosed):  # the test may have stopped it
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
        memory = self.instance.segment.slots()[slot]
        return slot >= 0 and np.array_equal(memory[: location.nbytes], np.concatenate(expected))

    def count(self, counter: Counter) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self.arena.counter_totals(totals)
        return int(totals[counter])
