"""The sources of prefetch candidates that a user asked for, made for one model."""

from __future__ import annotations

from collections.abc import Iterable

from hotset.runtime.config import BackendConfig
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.router import MemoryAwareRouter
from hotset.shm.layout import PrefetchSource
from hotset.workers.compute.gates import Gates
from hotset.workers.prefetch.affinity import Affinity
from hotset.workers.prefetch.gate_ahead import GateAhead
from hotset.workers.prefetch.runners_up import DEFAULT_THRESHOLD, RunnersUp
from hotset.workers.prefetch.source import Source
from hotset.workers.prefetch.transitions import Transitions


def make_sources(
    asked: Iterable[PrefetchSource],
    config: BackendConfig,
    checkpoint: Checkpoint,
    router: MemoryAwareRouter,
) -> dict[PrefetchSource, Source]:
    """In the order in which they were asked for."""
    model = checkpoint.config
    gates = Gates(model, checkpoint)

    def make(number: PrefetchSource) -> Source:
        match number:
            case PrefetchSource.GATE_AHEAD | PrefetchSource.GATE_AHEAD_2:
                return GateAhead(gates, 1 if number is PrefetchSource.GATE_AHEAD else 2)
            case PrefetchSource.RUNNERS_UP:
                threshold = config.prefetch_threshold
                return RunnersUp(DEFAULT_THRESHOLD if threshold is None else threshold)
            case PrefetchSource.AFFINITY:
                return Affinity(lambda: router.affinity.snapshot()[0])
            case PrefetchSource.TRANSITIONS:
                return Transitions(gates.layers, model.num_experts)
            case PrefetchSource.NONE | PrefetchSource.ENGINE:
                raise ValueError("the source is NONE, expected one that names experts")

    return {number: make(number) for number in asked}
