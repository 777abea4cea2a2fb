"""Sources "gate-ahead" and "gate-ahead-2": a later layer's gate applied to the hidden state of this one.

A layer adds little to the state, so what a later gate says of it now is mostly what it will say then.
"""

from __future__ import annotations

from collections.abc import Mapping

from hotset.workers.compute.gates import Gates
from hotset.workers.prefetch.source import LayerStep, Source


class GateAhead(Source):
    """Candidates are what the router would miss if the state reached the later layer as it is, whatever it prefers; the
    score is the weight that it would give them.

    Args:
        gates: of the model.
        distance: 1 looks at the next layer with experts, 2 at the one after it.
    """

    edges = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5)

    def __init__(self, gates: Gates, distance: int) -> None:
        self._gates = gates
        self._distance = distance

    def target(self, layer: int) -> int | None:
        return self._gates.ahead(layer, self._distance)

    def candidates(self, step: LayerStep, most: int) -> Mapping[int, float]:
        layer = self.target(step.layer)
        if layer is None:
            raise ValueError(f"layer is {step.layer}, expected one with {self._distance} after it")
        foreseen = step.foresee(layer, self._gates(layer, step.residual))
        if len(foreseen) <= most:
            return foreseen
        return dict(sorted(foreseen.items(), key=lambda item: item[1])[-most:])
