"""What a configuration accepts, clamps and refuses."""

from __future__ import annotations

from typing import Any

import pytest

from hotset.runtime import AffinityConfig, RouterConfig


def test_defaults() -> None:
    config = RouterConfig()
    assert (config.num_experts, config.top_k, config.memory_aware) == (8, 2, True)
    assert (config.cache_bonus, config.prefetch_threshold) == (0.15, 0.1)


@pytest.mark.parametrize(("given", "kept"), [(-0.5, 0.0), (0.3, 0.3), (1.5, 1.0)])
def test_bonus_and_threshold_are_clamped(given: float, kept: float) -> None:
    config = RouterConfig(cache_bonus=given, prefetch_threshold=given)
    assert (config.cache_bonus, config.prefetch_threshold) == (kept, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0, expected 1 to 8"),
        ({"top_k": 9}, "top_k is 9, expected 1 to 8"),
        ({"num_experts": 0}, "num_experts is 0, expected 1 to 1024"),
        ({"num_experts": 1025}, "num_experts is 1025, expected 1 to 1024"),
        ({"num_experts": 64, "top_k": 33}, "top_k is 33, expected 1 to 32"),
        ({"cache_bonus": float("nan")}, "cache_bonus is nan, expected a number"),
        ({"policy": "fastest"}, "policy is 'fastest', expected one of off, bonus, range, mass, resnorm, substitute"),
        ({"gating": "tanh"}, "gating is 'tanh', expected one of"),
        ({"keep_top": 3}, "keep_top is 3, expected 0 to 2"),
        ({"num_groups": 3}, "1 of 3 groups of 8 experts do not fit"),
        ({"num_groups": 8, "top_groups": 1}, "1 of 8 groups of 8 experts do not fit"),
        ({"mass_budget": -1.0}, "mass_budget is -1.0, expected 0 to"),
        ({"resnorm_strength": -1.0}, "resnorm_strength is -1.0, expected 0 to"),
        ({"substitute_limit": -1.0}, "substitute_limit is -1.0, expected 0 to"),
        ({"target_hit_rate": 1.5}, "target_hit_rate is 1.5, expected 0 to 1"),
        ({"affinity": AffinityConfig(9)}, "affinity.num_experts is 9, expected num_experts = 8"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0, expected at least 1"),
        ({"decay": 1.5}, "decay is 1.5, expected a number from 0 to 1"),
        ({"activation_boost": -1.0}, "activation_boost is -1.0"),
        ({"max_score": 0.0}, "max_score is 0.0, expected a number > 0"),
    ],
)
def test_affinity_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AffinityConfig(**options)
