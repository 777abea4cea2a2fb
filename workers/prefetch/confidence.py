"""How far a source can be trusted: measured, by outcomes that come whether or not anything was fetched."""

from __future__ import annotations

from bisect import bisect_right

from hotset.runtime.prefetch import LEAST_PRECISION

DOUBTS = 4.0  # outcomes of a bucket, all bad, that are counted before the first real one
MEMORY = 1024.0  # outcomes of a bucket, at which both sums are halved


class Confidence:
    """Of the candidates of one source that were absent when it named them: how many the layer's next step used, for
    each bucket of the score.

    Args:
        edges: where each bucket begins, ascending.
    """

    def __init__(self, edges: tuple[float, ...]) -> None:
        self._edges = edges
        self._named = [DOUBTS] * len(edges)
        self._used = [0.0] * len(edges)

    def bucket(self, score: float) -> int:
        """Of a score that is not below the first edge."""
        return bisect_right(self._edges, score) - 1

    def precision(self, bucket: int) -> float:
        """As far as known: 0 before anything is."""
        return self._used[bucket] / self._named[bucket]

    def trusts(self, bucket: int) -> bool:
        """Whether its candidates are worth a read."""
        return self._used[bucket] >= LEAST_PRECISION * self._named[bucket]

    def learn(self, bucket: int, *, used: bool) -> None:
        self._named[bucket] += 1
        self._used[bucket] += used
        if self._named[bucket] >= MEMORY:
            self._named[bucket] /= 2
            self._used[bucket] /= 2
