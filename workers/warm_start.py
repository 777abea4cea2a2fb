"""What an instance begins with and what it leaves behind: the pager's use of the model's heat file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.model.heat import Heat, UnusableHeat
from hotset.shm.layout import Section
from hotset.shm.segment import Segment
from hotset.workers.background_writer import BackgroundWriter

SAVE_SECONDS = 10.0  # what a kill can lose


class WarmStart:
    """Experts to load before anybody asks for them, into slots that are empty anyway; and the writing of the file.

    An instance whose own pager has written the file already is not warmed again: its arena holds what it had.

    Args:
        model: the folder or file served.
        segment: the arena. Its activation counts go into the file.
        process: the pager's row.
        enabled: otherwise the file is neither read nor written.
    """

    def __init__(self, model: Path, segment: Segment, process: int, *, enabled: bool) -> None:
        geometry = segment.layout.geometry
        shape = (geometry.num_layers, geometry.num_experts)
        self._problem: str | None = None
        self._model = model
        self._writer = BackgroundWriter(f"the heat file of {model}")
        self._arena = segment.arena
        self._affinity = ExpertAffinity(AffinityConfig(geometry.num_experts), segment=segment, process=process)
        self._instance = segment.uuid
        self._earlier = np.zeros(shape, np.uint64)
        self._previous = np.empty(0, np.int64)
        self._seed = np.zeros(shape, np.float32)
        self._saved = np.zeros(shape, np.uint64)
        self._next_save = time.monotonic() + SAVE_SECONDS if enabled else float("inf")
        self._waiting: deque[int] = deque()
        if not enabled:
            return
        try:
            heat = Heat.load(model, shape)
        except (UnusableHeat, OSError) as error:
            self._problem = str(error)
            return
        if heat is None:
            return
        self._previous = heat.ranking
        if heat.instance == self._instance:
            self._earlier = heat.earlier
            return
        self._earlier = heat.activations
        self._seed = heat.affinity
        self._waiting.extend(heat.ranking.tolist())

    def affinity(self) -> npt.NDArray[np.float32]:
        """Scores now, [layers, experts]: the arena's, and what is left of the file's."""
        scores, _ = self._affinity.snapshot()
        epochs = np.array([self._arena.load_u64(Section.LAYERS, layer, 0) for layer in range(len(scores))])
        # A moving average is linear: what was there at the start has faded since, whatever came on top.
        return np.minimum(scores + self._seed * self._affinity.config.decay ** epochs[:, None], 1).astype(np.float32)

    # ---- what to load

    def next(self) -> int | None:
        """The absent expert that is worth most; None when there is none left."""
        while self._waiting:
            expert = self._waiting.popleft()
            if self._arena.find(expert) < 0 and not self._arena.failed(expert):
                return expert
        return None

    def put_back(self, expert: int) -> None:
        """Its load was given up for a request that somebody waits for."""
        self._waiting.appendleft(expert)

    def drop(self, experts: Iterable[int]) -> None:
        """These are not wanted in memory."""
        unwanted = set(experts)
        self._waiting = deque(expert for expert in self._waiting if expert not in unwanted)

    def end(self) -> None:
        """No slot is empty any more."""
        self._waiting.clear()

    # ---- what to keep

    def is_save_due(self) -> bool:
        return time.monotonic() >= self._next_save

    def save(self, resident: Iterable[int], *, wait: bool = False) -> None:
        """Writes the file if there is something new, beside the pager's work; with `wait` it is written when this
        returns. `resident`: ids, the one that is worth most first."""
        if self._next_save == float("inf"):
            return
        self._next_save = time.monotonic() + SAVE_SECONDS
        if wait:
            self._writer.wait()
        if not self._writer.is_free():
            return
        current = np.zeros_like(self._earlier)
        self._arena.activation_totals(current)
        if np.array_equal(current, self._saved):
            return
        first = np.fromiter(resident, np.int64)
        heat = Heat(
            instance=self._instance,
            earlier=self._earlier,
            current=current,
            affinity=self.affinity(),
            ranking=np.concatenate([first, self._previous[~np.isin(self._previous, first)]]),
        )
        self._saved = current
        self._writer.begin(partial(heat.save, self._model))
        if wait:
            self._writer.wait()

    def take_problem(self) -> str | None:
        """Why there is nothing to begin with, or why the file cannot be written; said once."""
        problem, self._problem = self._problem, None
        return problem or self._writer.take_problem()
