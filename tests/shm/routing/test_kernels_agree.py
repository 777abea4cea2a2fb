"""All kernels give the same bits, for every batch size; that is what repeatable text rests on."""

from __future__ import annotations

from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotset.runtime.config import RoutingPolicy
from hotset.runtime.route_result import BatchRouteResult
from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RouterConfig
from hotset.shm import _core

KERNELS = _core.route_kernels()  # the plain one last: the oracle
POLICIES = get_args(RoutingPolicy)


def bits(array: np.ndarray) -> list[int]:
    return array.view(np.int32).ravel().tolist()


def logits(seed: int, rows: int, experts: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, experts)).astype(np.float32)
    if kind == "tied":
        values = np.round(values * 2) / 2
    elif kind == "odd":
        for odd in (np.nan, np.inf, -np.inf):
            values[rng.random(values.shape) < 0.02] = odd
    elif kind == "denormal":
        values *= np.float32(1e-40)
    elif kind == "huge":
        values *= np.float32(5e37)
    return values


def routed(
    config: RouterConfig,
    rows: np.ndarray,
    resident: list[int],
    kernel: str,
    strength: float | np.ndarray | None = None,
    *,
    prefetch: bool = False,
) -> tuple[BatchRouteResult, list[int]]:
    previous = _core.use_route_kernel(kernel)
    try:
        router = MemoryAwareRouter(config)
        router.update_cache_state(resident)
        result = router.route_batch(rows, strength=strength, prefetch=prefetch)
        return result, bits(router.affinity.scores())
    finally:
        _core.use_route_kernel(previous)


def assert_same(result: BatchRouteResult, expected: BatchRouteResult) -> None:
    assert result.experts.tolist() == expected.experts.tolist()
    assert bits(result.weights) == bits(expected.weights)
    for field in ("misses", "displaced", "prefetches", "lost_mass", "changed"):
        assert getattr(result, field) == getattr(expected, field), field


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    experts=st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 160, 256, 1024])),
    policy=st.sampled_from(POLICIES),
    kind=st.sampled_from(["ordinary", "tied", "odd", "denormal", "huge"]),
    renormalize=st.booleans(),
    prefetch=st.booleans(),
    data=st.data(),
)
def test_kernels_agree_bit_for_bit(
    seed: int, experts: int, policy: str, kind: str, renormalize: bool, prefetch: bool, data: st.DataObject
) -> None:
    config = RouterConfig(
        experts,
        data.draw(st.integers(1, min(experts, 10))),
        policy=policy,  # type: ignore[arg-type]
        renormalize=renormalize,
    )
    rows = logits(seed, 19, experts, kind)
    resident = np.flatnonzero(np.random.default_rng(seed).random(experts) < 0.5).tolist()
    plain, scores = routed(config, rows, resident, "plain", prefetch=prefetch)
    for kernel in KERNELS:
        result, its_scores = routed(config, rows, resident, kernel, prefetch=prefetch)
        assert_same(result, plain)
        assert its_scores == scores, kernel


def test_kernels_agree_where_the_bonus_rounds_logits_to_the_same_score() -> None:
    """Then the preferred experts may rank in another order than without it, also behind the last one selected."""
    rng = np.random.default_rng(5)
    pool = np.array([-1, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 0, -0.0, 1e-9, 2e-9, 3e-9], np.float32)
    for experts in (5, 9, 16, 25, 40, 64) * 10:
        rows = rng.choice(pool, (33, experts)).astype(np.float32)
        resident = np.flatnonzero(rng.random(experts) < rng.choice([0.3, 0.6, 0.95])).tolist()
        config = RouterConfig(experts, int(rng.integers(1, min(experts, 8) + 1)), cache_bonus=1.0)
        plain, _ = routed(config, rows, resident, "plain")
        for kernel in KERNELS:
            assert_same(routed(config, rows, resident, kernel)[0], plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_agree_on_logits_that_differ_in_their_last_bits_only(policy: str) -> None:
    """Batches rank by keys that leave these bits out, and have to notice where they matter."""
    rng = np.random.default_rng(11)
    for experts, k in ((8, 2), (9, 1), (20, 3), (64, 6), (64, 8), (128, 8), (300, 7)) * 3:
        values = rng.choice(np.array([-1.5, -1e-3, 1e-3, 1.0, 2.0], np.float32), (37, experts))
        last_bits = rng.integers(0, 1 << rng.integers(1, 14), values.shape, np.int32)
        rows = np.where(rng.random(values.shape) < 0.5, values, (values.view(np.int32) + last_bits).view(np.float32))
        resident = np.flatnonzero(rng.random(experts) < rng.choice([0.1, 0.5, 0.9])).tolist()
        strength = float(rng.choice(np.array([0, 1e-6, 1e-3, 1.0], np.float32)))
        config = RouterConfig(experts, k, policy=policy)  # type: ignore[arg-type]
        results = [routed(config, rows, resident, kernel, strength) for kernel in KERNELS]
        for result, scores in results:
            assert_same(result, results[0][0])
            assert scores == results[0][1]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    experts=st.one_of(st.integers(1, 70), st.sampled_from([100, 127, 128, 129, 192, 256, 300, 1024])),
    kind=st.sampled_from(["close", "ordinary", "tied", "odd", "denormal", "huge", "zeros"]),
    policy=st.sampled_from(["off", "bonus"]),
    strength=st.sampled_from([0.0, 1e-6, 0.15, 1.0, 30.0]),
    resident_share=st.sampled_from([0, 0.05, 0.5, 0.9, 1]),
    renormalize=st.booleans(),
    data=st.data(),
)
def test_kernels_agree_on_rows_that_come_alone(
    seed: int,
    experts: int,
    kind: str,
    policy: str,
    strength: float,
    resident_share: float,
    renormalize: bool,
    data: st.DataObject,
) -> None:
    """Preferred experts and others are ranked apart then, by keys that leave some bits out."""
    rng = np.random.default_rng(seed)
    rows = logits(seed, 12, experts, kind)
    if kind == "close":
        rows = (1 + rows * np.float32(10.0 ** -rng.integers(3, 8))).astype(np.float32)
    elif kind == "zeros":
        rows = np.where(rows < 0, np.float32(-0.0), np.float32(0)).astype(np.float32)
    resident = np.flatnonzero(rng.random(experts) < resident_share).tolist()
    top_k = data.draw(st.integers(1, min(experts, 9)))
    config = RouterConfig(experts, top_k, policy=policy, renormalize=renormalize)  # type: ignore[arg-type]
    for row in range(len(rows)):
        plain, scores = routed(config, rows[row : row + 1], resident, "plain", strength)
        for kernel in KERNELS:
            result, its_scores = routed(config, rows[row : row + 1], resident, kernel, strength)
            assert_same(result, plain)
            assert its_scores == scores, kernel


def test_kernels_agree_on_rows_that_come_alone_and_are_close() -> None:
    rng = np.random.default_rng(13)
    for experts, k in ((9, 1), (20, 3), (26, 8), (64, 1), (64, 6), (64, 8), (129, 5), (256, 8)):
        for scale in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
            rows = (1 + rng.normal(size=(40, experts)) * scale).astype(np.float32)
            resident = np.flatnonzero(rng.random(experts) < rng.choice([0.1, 0.5, 0.9])).tolist()
            config = RouterConfig(experts, k, policy="bonus")
            strength = float(rng.choice([0, scale, 30]))
            for row in range(len(rows)):
                results = [routed(config, rows[row : row + 1], resident, kernel, strength)[0] for kernel in KERNELS]
                for result in results:
                    assert_same(result, results[-1])


@pytest.mark.parametrize(("policy", "strength"), [("bonus", 3e38), ("range", 2.0)])
def test_kernels_agree_where_the_preference_exceeds_all_floats(policy: str, strength: float) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(scale=1e38, size=(40, 24)).astype(np.float32)
    config = RouterConfig(24, 4, policy=policy)  # type: ignore[arg-type]
    results = [routed(config, rows, list(range(0, 24, 2)), kernel, strength)[0] for kernel in KERNELS]
    for result in results:
        assert_same(result, results[0])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    experts=st.sampled_from([8, 20, 32, 64, 100, 256]),
    kind=st.sampled_from(["ordinary", "tied", "denormal", "huge"]),
    policy=st.sampled_from(["mass", "resnorm", "substitute"]),
    resident_share=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    renormalize=st.booleans(),
    by_row=st.booleans(),
)
def test_kernels_agree_where_residents_take_the_places_of_others(
    seed: int, experts: int, kind: str, policy: str, resident_share: float, renormalize: bool, by_row: bool
) -> None:
    """At strengths at which some of what is missing is replaced, and some is not."""
    rng = np.random.default_rng(seed)
    rows = logits(seed, 37, experts, kind)
    resident = np.flatnonzero(rng.random(experts) < resident_share).tolist()
    strength = (
        rng.random(37).astype(np.float32) * np.float32(0.3) if by_row else float(rng.choice([0.0, 0.02, 0.1, 0.4]))
    )
    top_k = int(rng.integers(1, 9))
    config = RouterConfig(experts, top_k, policy=policy, renormalize=renormalize, weight_scale=1.5)  # type: ignore[arg-type]
    plain, scores = routed(config, rows, resident, "plain", strength)
    for kernel in KERNELS:
        result, its_scores = routed(config, rows, resident, kernel, strength)
        assert_same(result, plain)
        assert its_scores == scores, kernel


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(st.sampled_from(["ordinary", "tied", "odd", "huge"]), min_size=1, max_size=10),
    policy=st.sampled_from(["off", "bonus"]),
    strength=st.sampled_from([None, 0.0, 1.5, "by row"]),
    count=st.integers(1, 180),
    renormalize=st.booleans(),
)
def test_kernels_agree_on_two_of_eight_experts(
    seed: int, kinds: list[str], policy: str, strength: float | str | None, count: int, renormalize: bool
) -> None:
    """Whole tiles of ordinary rows have a kernel of their own, and the rest lies between them."""
    parts = [logits(seed + i, 1 + 31 * (kind == "ordinary"), 8, kind) for i, kind in enumerate(kinds)]
    rows = np.resize(np.concatenate(parts), (count, 8))
    rng = np.random.default_rng(seed)
    resident = np.flatnonzero(rng.random(8) < 0.5).tolist()
    given = rng.random(count).astype(np.float32) if strength == "by row" else strength
    config = RouterConfig(8, 2, policy=policy, renormalize=renormalize, weight_scale=1.5)  # type: ignore[arg-type]
    plain, scores = routed(config, rows, resident, "plain", given)  # type: ignore[arg-type]
    for kernel in KERNELS:
        result, its_scores = routed(config, rows, resident, kernel, given)  # type: ignore[arg-type]
        assert_same(result, plain)
        assert its_scores == scores, kernel


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 9])
def test_nothing_is_written_beyond_the_outputs(k: int) -> None:
    rows = logits(1, 50, 12, "ordinary")
    router = MemoryAwareRouter(RouterConfig(12, k))
    router.update_cache_state([0, 5])
    for count in (1, 2, 5, 8, 15, 16, 17, 18, 33, 47, 50):
        experts, weights = np.full(count * k + 16, -7, np.int32), np.full(count * k + 16, -7, np.float32)
        inside = experts[: count * k].reshape(count, k), weights[: count * k].reshape(count, k)
        router.bind(rows[:count], *inside)()
        assert (experts[count * k :] == -7).all() and (weights[count * k :] == -7).all()
        assert (inside[0] >= 0).all() and (inside[1] >= 0).all()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (16, 4), (60, 4), (64, 8), (128, 8), (256, 9)])
def test_a_rows_weights_do_not_depend_on_its_batch(experts: int, k: int, renormalize: bool) -> None:
    rows = logits(1, 50, experts, "ordinary")
    router = MemoryAwareRouter(RouterConfig(experts, k, policy="off", renormalize=renormalize))
    whole = router.route_batch(rows)
    for start, stop in ((0, 1), (0, 7), (3, 12), (49, 50)):
        part = router.route_batch(rows[start:stop])
        assert part.experts.tolist() == whole.experts[start:stop].tolist()
        assert bits(part.weights) == bits(whole.weights[start:stop])
    shuffled = router.route_batch(np.ascontiguousarray(rows[::-1]))
    assert bits(shuffled.weights[::-1].copy()) == bits(whole.weights)


@pytest.mark.usefixtures("kernel")
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), policy=st.sampled_from(POLICIES))
def test_inv6_the_same_inputs_select_the_same_experts(seed: int, policy: str) -> None:
    """Same logits, mask, running range and parameters, but another history of affinity and counters."""
    rows = logits(seed, 8, 64, "tied")
    config = RouterConfig(64, 6, policy=policy)  # type: ignore[arg-type]
    resident = list(range(seed % 3, 64, 3))
    fresh, used = MemoryAwareRouter(config), MemoryAwareRouter(msgspec.structs.replace(config))
    used.route_batch(logits(seed ^ 1, 40, 64, "ordinary"), policy="bonus")  # leaves the running range alone
    for router in (fresh, used):
        router.update_cache_state(resident)
    first, second = fresh.route_batch(rows, prefetch=True), used.route_batch(rows, prefetch=True)
    assert first.experts.tolist() == second.experts.tolist()
    assert bits(first.weights) == bits(second.weights)
    assert (first.misses, first.displaced, first.prefetches) == (second.misses, second.displaced, second.prefetches)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no routing kernel 'avx9'"):
        _core.use_route_kernel("avx9")
