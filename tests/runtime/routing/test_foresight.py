"""What a router says that it would miss is what it then misses, and saying it changes nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hotset.runtime import MemoryAwareRouter, RouterConfig
from hotset.runtime.router_config import POLICIES, RESIDUAL_POLICIES
from hotset.shm.geometry import Geometry, SlotClass
from hotset.shm.segment import Segment

STRENGTHS: dict[str, Any] = {
    "bonus": {"cache_bonus": 1.0},
    "range": {"range_strength": 0.2},
    "mass": {"mass_budget": 0.1},
    "resnorm": {"resnorm_strength": 0.2},
    "substitute": {"substitute_limit": 0.1},
    "off": {},
}


def logits_of(rows: int, experts: int = 64) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, experts)).astype(np.float32)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_what_is_foreseen_is_missed(policy: Any, rows: int) -> None:
    router = MemoryAwareRouter(RouterConfig(64, 6, policy=policy, **STRENGTHS[policy]))
    router.update_cache_state(range(0, 64, 3))
    logits = logits_of(rows)
    options = {"residual_ratio": np.ones(rows, np.float32)} if policy in RESIDUAL_POLICIES else {}
    foreseen = router.foresee(logits, **options)
    routed = router.route_batch(logits, **options)
    assert foreseen.keys() == routed.misses
    for expert, weight in foreseen.items():
        assert weight == routed.weights[routed.experts == expert].max()


def test_nothing_is_counted_or_learned() -> None:
    router = MemoryAwareRouter(RouterConfig(64, 6, policy="range", range_strength=0.2))
    before = router.metrics.summary(), router.affinity.scores().tolist(), router.affinity.snapshot()[1].tolist()
    router.foresee(logits_of(5))
    assert (
        router.metrics.summary(),
        router.affinity.scores().tolist(),
        router.affinity.snapshot()[1].tolist(),
    ) == before
    first, second = router.route_batch(logits_of(1)), router.foresee(logits_of(1))
    assert second.keys() == first.misses


def test_what_is_being_loaded_is_not_missed() -> None:
    geometry = Geometry(num_layers=1, num_experts=8, pins_per_process=2, slot_classes=(SlotClass(3, 64),))
    segment = Segment.private(geometry)
    router = MemoryAwareRouter(RouterConfig(8, 2), segment=segment)
    logits = np.array([[9, 8, 0, 0, 0, 0, 0, 0]], np.float32)
    assert {*router.foresee(logits)} == {0, 1}
    segment.arena.load_begin(0, 1)
    assert {*router.foresee(logits)} == {0}
    segment.close()


def test_wrong_logits_are_refused() -> None:
    router = MemoryAwareRouter(RouterConfig(64, 6))
    with pytest.raises(ValueError, match=r"logits"):
        router.foresee(np.zeros((2, 63), np.float32))
    assert router.foresee(np.zeros((0, 64), np.float32)) == {}
