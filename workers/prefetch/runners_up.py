"""Source "runners-up": experts that the gate almost wanted, for the layer's next step."""

from __future__ import annotations

import numpy as np

from hotset.workers.prefetch.source import Float32, LayerStep, RankedSource

DEFAULT_THRESHOLD = 0.02


class RunnersUp(RankedSource):
    """The score is the largest gate probability that a row gave to an expert that no row uses.

    Args:
        threshold: the least gate probability of a candidate (`prefetch_threshold`).
    """

    edges = (0.0, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15)

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def target(self, layer: int) -> int:
        return layer

    def scores(self, step: LayerStep) -> Float32:
        weights = np.exp(step.gate_logits - step.gate_logits.max(axis=1, keepdims=True))
        scores = (weights / weights.sum(axis=1, keepdims=True)).max(axis=0)
        scores[scores < self._threshold] = -np.inf
        scores[step.experts.ravel()] = -np.inf
        return scores
