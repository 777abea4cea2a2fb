"""Sources "gate-ahead" and "gate-ahead-2": a later layer's gate applied to the hidden state of this one.

A layer adds little to the state, so what a later gate says of it now is mostly what it will say then.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hotset.workers.compute.gates import Gates
from hotset.workers.prefetch.source import Float32, LayerStep, Source

Preference = Callable[[int], tuple[float, list[int]]]
"""layer -> (what the routing policy adds to the logits of preferred experts, those experts)."""


class GateAhead(Source):
    """The score is by how much what the gate ranks by is above what selection takes, in units of the row's max - min.

    Args:
        gates: of the model.
        distance: 1 looks at the next layer with experts, 2 at the one after it.
        top_k: experts per token.
        preference: of the routing policy; None where the gate alone decides.
    """

    edges = (-0.02, 0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)

    def __init__(self, gates: Gates, distance: int, top_k: int, preference: Preference | None = None) -> None:
        self._gates = gates
        self._distance = distance
        self._top_k = top_k
        self._preference = preference

    def target(self, layer: int) -> int | None:
        return self._gates.ahead(layer, self._distance)

    def scores(self, step: LayerStep) -> Float32:
        layer = self.target(step.layer)
        if layer is None:
            raise ValueError(f"layer is {step.layer}, expected one with {self._distance} after it")
        logits = self._gates(layer, step.residual)
        num_experts = logits.shape[1]
        first = num_experts - self._top_k
        if first <= 0:
            return np.zeros(num_experts, np.float32)
        ranked = adjusted = self._gates.scores(layer, logits)
        if self._preference is not None:
            bonus, preferred = self._preference(layer)
            if bonus:
                raised = logits.copy()
                raised[:, preferred] += bonus
                adjusted = self._gates.scores(layer, raised)
        ordered = np.partition(adjusted, (first - 1, first), axis=1)
        threshold = (ordered[:, first - 1] + ordered[:, first]) / 2  # half-way between the last chosen and the next
        spread = np.maximum(np.ptp(ranked, axis=1), 1e-9)
        return ((ranked - threshold[:, None]) / spread[:, None]).max(axis=0)
