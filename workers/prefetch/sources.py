"""The sources of prefetch candidates that a user asked for, made for one model."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from hotset.runtime.config import BackendConfig
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.router import MemoryAwareRouter
from hotset.shm.layout import LAYER_STATE, PrefetchSource, Section
from hotset.shm.segment import Segment
from hotset.workers.compute.gates import Gates
from hotset.workers.prefetch.affinity import Affinity
from hotset.workers.prefetch.gate_ahead import GateAhead, Preference
from hotset.workers.prefetch.runners_up import DEFAULT_THRESHOLD, RunnersUp
from hotset.workers.prefetch.source import Source
from hotset.workers.prefetch.transitions import Transitions

LOGIT_RANGE = LAYER_STATE.fields["logit_range"][1] // 4  # of a layer's state, in words of 32 bits


def make_sources(
    asked: Iterable[PrefetchSource],
    config: BackendConfig,
    checkpoint: Checkpoint,
    segment: Segment,
    router: MemoryAwareRouter,
) -> dict[PrefetchSource, Source]:
    """In the order in which they were asked for."""
    model = checkpoint.config
    gates = Gates(model, checkpoint)
    preference = preference_of(segment, router)

    def make(number: PrefetchSource) -> Source:
        match number:
            case PrefetchSource.GATE_AHEAD | PrefetchSource.GATE_AHEAD_2:
                distance = 1 if number is PrefetchSource.GATE_AHEAD else 2
                return GateAhead(gates, distance, model.experts_per_token, preference)
            case PrefetchSource.RUNNERS_UP:
                threshold = config.prefetch_threshold
                return RunnersUp(DEFAULT_THRESHOLD if threshold is None else threshold)
            case PrefetchSource.AFFINITY:
                return Affinity(lambda: router.affinity.snapshot()[0])
            case PrefetchSource.TRANSITIONS:
                return Transitions(gates.layers, model.num_experts)
            case PrefetchSource.NONE:
                raise ValueError("the source is NONE, expected one that names experts")

    return {number: make(number) for number in asked}


def preference_of(segment: Segment, router: MemoryAwareRouter) -> Preference | None:
    """What the routing policy adds to logits, if it works by adding to them."""
    arena = segment.arena
    match router.config.policy:
        case "bonus":
            return lambda layer: (router.strength, router.resident_experts(layer))
        case "range":

            def by_range(layer: int) -> tuple[float, list[int]]:
                bits = arena.load_u32(Section.LAYERS, layer, LOGIT_RANGE)
                spread: float = struct.unpack("<f", struct.pack("<I", bits))[0]
                return router.strength * spread, router.resident_experts(layer)

            return by_range
        case _:
            return None
