"""A pager to be measured, asked for experts as a worker asks."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hotset.runtime.config import BackendConfig
from hotset.runtime.instance import Instance
from hotset.runtime.messages.pager import FromPager, PagerReady, StartPager
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.runtime.supervision import Child
from hotset.shm.counters import Counter, Histogram
from hotset.shm.layout import COUNTERS_PER_PROCESS, HISTOGRAM_BUCKETS
from hotset.shm.paging_queue import PagingMessage, PagingPriority, PagingQueue
from hotset.shm.segment import new_instance_name
from hotset.workers.expert_access import ExpertAccess

WORKER = 0


class PagerUnderTest:
    """A pager process on an arena of its own, and this process in the place of its only worker."""

    def __init__(self, folder: Path, slots: int, expert_nbytes: int, **settings: Any) -> None:
        config = BackendConfig(
            model=str(folder),
            workers=1,
            expert_budget=slots * (expert_nbytes + 4096),
            max_num_seqs=1,
            warm_start=False,
            eviction="affinity",  # with which `fill_prefetch_queue` makes what it asks for worth a slot
            **settings,
        )
        model = ModelConfig.load(folder)
        plan = plan_instance(config, model, Checkpoint.open(folder, model))
        with contextlib.ExitStack() as ending:  # a signal may come while the pager starts
            self.instance = Instance(new_instance_name(), plan)
            ending.callback(self.instance.remove)
            self.arena = self.instance.arena
            self.queue = PagingQueue.attach(self.instance.name)
            ending.callback(self.queue.close)
            self.access = ExpertAccess(self.instance.segment, self.queue, WORKER)
            # In a session of its own: the terminal's Ctrl-C is for this process.
            self._child: Child[FromPager] = Child("hotset.workers.pager", FromPager, own_session=True)
            ending.callback(self._child.reap)
            ending.callback(self._child.kill)
            self._child.channel.send(StartPager.of(self.instance.name, plan, config))
            answer = self._child.channel.wait()
            if not isinstance(answer, PagerReady):
                raise RuntimeError(f"the pager did not start: {answer}")
            self._ending = ending.pop_all()

    def close(self) -> None:
        self._ending.close()

    def counter(self, counter: Counter) -> int:
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self.arena.counter_totals(totals)
        return int(totals[counter])

    def page_in_times(self) -> npt.NDArray[np.uint64]:
        """The histogram of all page-ins so far."""
        buckets = np.empty(HISTOGRAM_BUCKETS, np.uint64)
        self.arena.histogram_totals(Histogram.PAGING, buckets)
        return buckets

    def page_in(self, order: list[int]) -> float:
        """Seconds per expert that was read, when a worker takes one after the other, several requested ahead."""
        before, began = self.counter(Counter.URGENT_PAGE_INS), time.perf_counter()
        for _ in self.access.resident(0, order):
            pass
        return (time.perf_counter() - began) / (self.counter(Counter.URGENT_PAGE_INS) - before)

    def fill_prefetch_queue(self, candidates: list[int]) -> None:
        """All that are absent, each worth more than what is resident."""
        absent = [expert for expert in candidates if self.arena.find(expert) < 0]
        # What the eviction policy knows of an expert is how often steps used it.
        self.access.note_demand(0, np.array([absent], np.int32))
        asked = [expert for expert in absent if self.arena.request_prefetch(expert)]
        if asked:
            self.queue.send(PagingMessage(0, asked, priority=PagingPriority.PREFETCH))

    def forget_prefetches(self) -> None:
        while self.arena.prefetch_requests():
            for expert in self.arena.prefetch_requests():
                self.arena.withdraw_prefetch(expert)
            time.sleep(0.01)
