"""The preference's strength moves towards a target hit rate, under a ceiling on what it costs."""

from __future__ import annotations

import numpy as np

from hotset.runtime import MemoryAwareRouter, RouterConfig
from hotset.runtime.router_config import Policy

EXPERTS, TOP_K = 32, 4


def run(batches: int = 200, **options: object) -> MemoryAwareRouter:
    config = RouterConfig(EXPERTS, TOP_K, adaptive=True, **options)  # type: ignore[arg-type]
    router = MemoryAwareRouter(config)
    router.update_cache_state(range(0, EXPERTS, 4))
    rng = np.random.default_rng(0)
    for number in range(batches):
        if number == batches // 2:
            router.reset_metrics()
        router.route_batch(rng.normal(size=(256, EXPERTS)).astype(np.float32))
    return router


def test_it_is_raised_until_the_target_is_met() -> None:
    policies: tuple[Policy, ...] = ("bonus", "range", "mass", "resnorm", "substitute")
    for policy in policies:
        router = run(
            policy=policy,
            target_hit_rate=0.5,
            max_lost_mass=1.0,
            cache_bonus=0.0,
            mass_budget=0.0,
            resnorm_strength=0.0,
            substitute_limit=0.0,
            max_strength=0.25 if policy == "substitute" else 1.0,  # in 64 steps, the finer the more one changes
        )
        assert 0.49 <= router.hit_rate() <= 0.57, policy


def test_it_is_lowered_when_the_hit_rate_is_five_points_above() -> None:
    router = run(target_hit_rate=0.3, max_lost_mass=1.0, cache_bonus=1.0, max_strength=2.0)
    assert 0.28 <= router.hit_rate() <= 0.37
    assert router.strength < 0.3


def test_it_stays_below_the_ceiling_on_lost_mass() -> None:
    router = run(policy="bonus", target_hit_rate=1.0, max_lost_mass=0.01)
    summary = router.metrics.summary()
    assert summary.mean_lost_mass < 0.015
    assert summary.hit_rate > 0.25


def test_it_stays_below_its_maximum() -> None:
    assert run(target_hit_rate=1.0, max_lost_mass=1.0, max_strength=0.25).strength == 0.25


def test_calls_with_another_policy_do_not_move_it() -> None:
    router = MemoryAwareRouter(RouterConfig(EXPERTS, TOP_K, adaptive=True, target_hit_rate=1.0))
    before = router.strength
    for _ in range(20):
        router.route_batch(np.zeros((256, EXPERTS), np.float32), policy="off")
    assert router.strength == before


def test_without_it_the_strength_stays() -> None:
    router = MemoryAwareRouter(RouterConfig(cache_bonus=0.25))
    router.route_batch(np.zeros((2000, 8), np.float32))
    assert router.strength == 0.25
