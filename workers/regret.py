"""The helper process that says what the cache could have done: LRU and Belady's MIN on the demands of late.

It follows the rings that the workers write (shm/core/demand_ring.h), replays a window of them through caches of the
same number of slots, at the lowest priority, and tells the coordinator. Nothing depends on it: without it the figures
are missing, and that is all.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections import deque

import numpy as np

from hotset.runtime.channel import Channel
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.messages.regret import ForgetDemands, RegretMeasured, StartRegret, ToRegret
from hotset.runtime.stats import Regret
from hotset.runtime.supervision import run_child
from hotset.shm.demands import DemandReader, Records, split_records, stamp_of
from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment
from hotset.workers.eviction.replay import MIN, replay

WINDOW_DEMANDS = 16_384  # of one step and layer each
READ_SECONDS = 0.1  # the rings hold more than is written in that time
REST = 32  # times as long as the last replay took


class DemandWindow:
    """The latest demands of all workers, in the order of their stamps."""

    def __init__(self, size: int = WINDOW_DEMANDS) -> None:
        self._records: deque[Records] = deque(maxlen=size)

    def read(self, reader: DemandReader) -> bool:
        """Whether there was anything new."""
        new = [record for records, _ in reader.read() for record in split_records(records.copy())]
        new.sort(key=stamp_of)
        self._records.extend(new)
        return bool(new)

    def forget(self) -> None:
        self._records.clear()

    def measure(self, geometry: Geometry) -> Regret | None:
        """None while no decode step is in the window. Where slots are of several sizes, this does as if any expert
        fitted any of them."""
        if not self._records:
            return None
        records = np.concatenate(self._records)
        results = {
            policy: replay(
                records,
                policy,
                num_layers=geometry.num_layers,
                num_experts=geometry.num_experts,
                slots=geometry.num_slots,
                shared=True,
            )
            for policy in ("lru", MIN)
        }
        lru, ceiling = results["lru"], results[MIN]
        accesses = lru.hits + lru.misses
        if not accesses:
            return None
        return Regret(
            demands=lru.events,
            lru_hit_rate=lru.hit_rate,
            min_hit_rate=ceiling.hit_rate,
            crowd=accesses / lru.events / (geometry.num_slots / geometry.num_layers),
        )


def follow(channel: Channel[ToRegret], start: StartRegret) -> None:
    """Returns when the coordinator says so; raises `ChannelClosed` when it is gone."""
    geometry = start.plan.geometry
    segment = Segment.attach(start.instance, geometry)
    reader, window = DemandReader(segment), DemandWindow()
    next_replay, news = 0.0, False
    while True:
        for message in channel.receive():
            if isinstance(message, StopWorking):
                return
            if isinstance(message, ForgetDemands):
                window.read(reader)
                window.forget()
        news |= window.read(reader)
        if news and time.monotonic() >= next_replay:
            began, news = time.monotonic(), False
            if (regret := window.measure(geometry)) is not None:
                channel.send(RegretMeasured(regret))
            next_replay = time.monotonic() + REST * (time.monotonic() - began)
        select.select([channel], [], [], READ_SECONDS)


def main(arguments: list[str]) -> int:
    os.nice(19)
    # A nice process still keeps a core from a worker's thread that wakes on it for a while; an idle one does not.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    return run_child(arguments, ToRegret, StartRegret, follow)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
