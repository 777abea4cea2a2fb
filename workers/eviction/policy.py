"""Which resident expert goes when a slot is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.config import EvictionPolicy
from hotset.shm.segment import Segment


class Eviction(Protocol):
    """Orders resident experts from the one to evict first to the one to keep longest."""

    def order(self, experts: npt.NDArray[np.int64]) -> Iterator[int]:
        """Indices into `experts` (global ids), the first victim first."""
        ...

    def prefers(self, candidate: int, victim: int) -> bool:
        """Whether an expert that nobody waits for is worth the slot of a resident one (global ids)."""
        ...


class AffinityEviction:
    """The least affinity goes first: a moving average of how often a layer's steps selected the expert.

    Equal scores: the one that was selected longest ago.
    """

    def __init__(self, affinity: ExpertAffinity) -> None:
        self._affinity = affinity

    def order(self, experts: npt.NDArray[np.int64]) -> Iterator[int]:
        scores, epochs = self._affinity.snapshot()
        yield from np.lexsort((epochs.ravel()[experts], scores.ravel()[experts])).tolist()

    def prefers(self, candidate: int, victim: int) -> bool:
        scores = self._affinity.snapshot()[0].ravel()
        return bool(scores[candidate] > scores[victim])


class LruEviction:
    """The expert that was selected longest ago goes first: by the epoch of its affinity slot."""

    def __init__(self, affinity: ExpertAffinity) -> None:
        self._affinity = affinity

    def order(self, experts: npt.NDArray[np.int64]) -> Iterator[int]:
        _, epochs = self._affinity.snapshot()
        yield from np.argsort(epochs.ravel()[experts], kind="stable").tolist()

    def prefers(self, candidate: int, victim: int) -> bool:
        epochs = self._affinity.snapshot()[1].ravel()
        return bool(epochs[candidate] > epochs[victim])


def make_eviction(policy: EvictionPolicy, segment: Segment, process: int) -> Eviction:
    affinity = ExpertAffinity(AffinityConfig(segment.layout.geometry.num_experts), segment=segment, process=process)
    return {"affinity": AffinityEviction, "lru": LruEviction}[policy](affinity)
