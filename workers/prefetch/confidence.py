"""How far a source can be trusted: measured, by outcomes that come whether or not anything was fetched."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEAST_PRECISION = 0.6  # a prefetch that is used less often costs more reads than it saves waits
DOUBTS = 4.0  # outcomes of a bucket, all bad, that are counted before the first real one
MEMORY = 1024.0  # outcomes of a bucket, at which both sums are halved


class Confidence:
    """Of the candidates of one source that were absent when it named them: how many the layer's next step used, for
    each bucket of the score.

    Args:
        edges: of the buckets, ascending.
    """

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = np.array(edges, np.float32)
        self._named = np.zeros(len(edges) + 1)
        self._used = np.zeros(len(edges) + 1)

    def buckets(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._edges, scores, "right")

    def trusts(self, buckets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which candidates are worth a read."""
        return self.precision()[buckets] >= LEAST_PRECISION

    def precision(self) -> npt.NDArray[np.float64]:
        """Of each bucket, as far as known: 0 before anything is."""
        return self._used / (self._named + DOUBTS)

    def learn(self, buckets: npt.NDArray[np.int64], used: npt.NDArray[np.bool_]) -> None:
        np.add.at(self._named, buckets, 1)
        np.add.at(self._used, buckets, used)
        full = self._named >= MEMORY
        self._named[full] /= 2
        self._used[full] /= 2
