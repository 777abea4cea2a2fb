"""What the routing stress test checks, and the count of it, which survives the process that did the counting."""

from __future__ import annotations

import enum
import mmap
import os
from pathlib import Path

import numpy as np

from hotset.shm.geometry import Geometry
from hotset.shm.layout import COUNTERS_PER_PROCESS, Layout
from hotset.shm.segment import Segment

VIOLATIONS = 16  # where the counters of violations begin in a row


class Check(enum.IntEnum):
    """Index of its counter; `described` is the sentence of the report."""

    SLOT_BYTES = 0
    SCORES = 1
    BUDGET = 2
    FORMAT = 3
    WHOLE = 4
    SELECTION = 5
    PINS = 6
    REQUESTS = 7
    AFFINITY = 8
    COUNTS = 9
    PROCESSES = 10
    LEFTOVERS = 11

    @property
    def title(self) -> str:
        return _DESCRIPTIONS[self][0]

    @property
    def described(self) -> str:
        return _DESCRIPTIONS[self][1]


_DESCRIPTIONS = {
    Check.SLOT_BYTES: (
        "INV-1",
        "a used or resident slot's bytes have the checksum that the expert was written with",
    ),
    Check.SCORES: (
        "INV-2",
        "between two snapshots a score rises by its activations at most, and no epoch goes back",
    ),
    Check.BUDGET: (
        "INV-3",
        "bytes of loaded and loading experts stay within the budget; no expert is in two slots",
    ),
    Check.FORMAT: ("INV-4", "a slot's format and length are the expert's"),
    Check.WHOLE: (
        "INV-5",
        "what is marked resident is there whole, byte for byte; masks and directory agree with it",
    ),
    Check.SELECTION: (
        "INV-6",
        "same logits, mask, range and parameters: same selection, and as plain numpy selects",
    ),
    Check.PINS: ("pins", "a pinned resident expert stays in its slot; no dead or idle worker has a pin"),
    Check.REQUESTS: ("lost requests", "no worker waits without progress, nothing is asked for after a drain"),
    Check.AFFINITY: (
        "affinity",
        "after a burst of all workers, scores equal a float64 recomputation within 1e-4",
    ),
    Check.COUNTS: (
        "counts",
        "after a burst, epochs, activations and routed tokens equal the workers' logs exactly",
    ),
    Check.PROCESSES: ("processes", "no process ends unless it is killed or told to"),
    Check.LEFTOVERS: ("leftovers", "no segment, lock or queue is left"),
}


class Scoreboard:
    """How often each check was made and violated; a row per process, written by that process alone.

    Kept in a file that all processes map, so that what a worker had counted before it was killed is not lost.
    """

    def __init__(self, file: Path, num_processes: int, process: int) -> None:
        layout = Layout(Geometry(num_layers=1, num_experts=1, num_processes=num_processes))
        create = not file.exists()
        with file.open("w+b" if create else "r+b") as opened:
            opened.truncate(layout.nbytes)
            memory = mmap.mmap(opened.fileno(), layout.nbytes)
        if create:
            with memoryview(memory) as view:
                layout.write_header(view, uuid=bytes(16), boot_id=bytes(16), pid=os.getpid(), start_time=0)
        self._arena = Segment(memory, layout, None).arena
        self._process = process

    def checked(self, check: Check, times: int = 1) -> None:
        self._arena.count(self._process, check, times)

    def violated(self, check: Check, times: int = 1) -> None:
        self._arena.count(self._process, check + VIOLATIONS, times)

    def totals(self) -> dict[Check, tuple[int, int]]:
        """(checked, violated) of each, summed over the processes."""
        totals = np.empty(COUNTERS_PER_PROCESS, np.uint64)
        self._arena.counter_totals(totals)
        return {check: (int(totals[check]), int(totals[check + VIOLATIONS])) for check in Check}
