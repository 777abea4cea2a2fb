"""What eviction policies, and Belady's MIN, would have hit on recorded demands."""

from __future__ import annotations

from typing import get_args

import msgspec

from hotset.runtime.eviction import Admission, EvictionBase, EvictionSettings, parse_eviction
from hotset.shm.demands import Records
from hotset.workers.eviction import _core

MIN = "min"  # Belady's: knows the future; not a policy that one can serve with


class ReplayResult(msgspec.Struct, frozen=True):
    """Distinct experts per step of a layer, counted once each; steps of no stream (prefills) are not counted."""

    events: int
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 0.0


def make_policy(
    settings: EvictionSettings, *, num_layers: int, num_experts: int, num_streams: int, slots_per_layer: float
) -> _core.Policy:
    return _core.Policy(
        num_layers,
        num_experts,
        num_streams,
        get_args(EvictionBase).index(settings.base),
        settings.affinity_weight,
        get_args(Admission).index(settings.admission),
        slots_per_layer,
    )


def replay(
    records: Records,
    policy: str,
    *,
    num_layers: int,
    num_experts: int,
    slots: int,
    num_streams: int = 1,
    shared: bool = False,
) -> ReplayResult:
    """Replays records event by event, from an empty cache.

    Args:
        records: of steps in order; see shm/core/demands.h.
        policy: "min", or what `parse_eviction` takes.
        num_layers, num_experts: of the model.
        slots: per layer, or of the shared pool, in which layers keep what policy.h says.
        num_streams: tokens per step.
        shared: one pool of `slots` instead of one for each layer.
    """
    per_layer = slots / num_layers if shared else slots
    settings = EvictionSettings("lru") if policy == MIN else parse_eviction(policy)
    core = make_policy(
        settings, num_layers=num_layers, num_experts=num_experts, num_streams=num_streams, slots_per_layer=per_layer
    )
    run = core.replay_min if policy == MIN else core.replay
    return ReplayResult(*run(records, slots, shared=shared))
