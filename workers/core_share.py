"""How many threads a worker computes with: the cores are shared by the workers that have something to compute."""

from __future__ import annotations

import os

from hotset.shm import _core
from hotset.shm.counters import Counter
from hotset.shm.layout import Section
from hotset.workers.compute import _kernels


class CoreShare:
    """A worker's share of the cores: all of them while the others rest.

    Each worker says in its own row of counters whether it computes, and looks at the others' rows before a step. What
    it sees may be a step old, and of a worker that was killed until its successor begins: then a step takes longer, and
    computes the same.

    Args:
        arena: of the instance.
        process: this worker's row.
        num_workers: rows 0 to num_workers - 1 are the workers'.
    """

    def __init__(self, arena: _core.Arena, process: int, num_workers: int) -> None:
        self._arena = arena
        self._process = process
        self._others = [other for other in range(num_workers) if other != process]
        self._cores = len(os.sched_getaffinity(0))
        self._threads = 0
        self._computes = True
        self.rest()

    def take(self) -> None:
        """Before a step."""
        self._say(computes=True)
        others = sum(self._arena.load_u64(Section.COUNTERS, other, Counter.COMPUTING) for other in self._others)
        threads = min(_kernels.MAX_THREADS, max(1, self._cores // (1 + others)))
        if threads != self._threads:
            _kernels.set_num_threads(threads)
            self._threads = threads

    def rest(self) -> None:
        """Nothing is to be computed."""
        self._say(computes=False)

    def _say(self, *, computes: bool) -> None:
        if computes != self._computes:
            self._arena.store_u64(Section.COUNTERS, self._process, Counter.COMPUTING, int(computes))
            self._computes = computes
