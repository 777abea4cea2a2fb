"""Violations that the routing stress test does itself, to see whether its checks find them."""

from __future__ import annotations

import os
import signal

from stress_tests.arena_counters import ArenaCounters
from stress_tests.messages import Planted

from hotset.shm.layout import Section, SlotState
from hotset.shm.segment import Segment


def plant(planted: Planted, segment: Segment, counters: ArenaCounters, pager_pid: int) -> bool:
    """Whether it is done; False: no expert is resident yet. Some are done elsewhere, where they belong."""
    arena = segment.arena
    slots = [s for s in range(segment.layout.geometry.num_slots) if arena.slot(s)[2] == SlotState.RESIDENT]
    if planted == "stopped-pager":
        os.kill(pager_pid, signal.SIGSTOP)
    elif planted == "score":
        rare = int(counters.activations()[0].argmin())
        now = arena.load_u64(Section.LAYERS, 0, 0)
        arena.store_u64(Section.AFFINITY, 0, rare, 0xFFFFFF << 40 | now)  # the largest score
    elif not slots:
        return False
    for slot in slots:
        if planted == "slot-byte":
            segment.slots()[slot][77] ^= 1
        elif planted == "format":
            segment.view(Section.SLOT_INFO)[slot, 0]["format"] = 0
        elif planted == "slot-length":
            segment.view(Section.SLOT_INFO)[slot, 0]["nbytes"] = 100 << 20
    return True
