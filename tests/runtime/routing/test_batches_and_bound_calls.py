"""A batch equals its tokens one by one; a bound call equals the call it stands for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hotset.runtime import AffinityConfig, MemoryAwareRouter, RouterConfig
from hotset.runtime.router_config import Policy

RESIDENT = range(0, 32, 3)


def make(policy: Policy = "bonus") -> MemoryAwareRouter:
    router = MemoryAwareRouter(RouterConfig(32, 4, policy=policy, timing=False), num_layers=2)
    router.update_cache_state(RESIDENT, layer=1)
    return router


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 32)).astype(np.float32)


@pytest.mark.parametrize("policy", ["off", "bonus", "range", "mass", "resnorm", "substitute"])
@pytest.mark.parametrize("tokens", [1, 2, 37, 1500])
def test_a_batch_equals_the_sequence_of_single_calls(policy: Policy, tokens: int) -> None:
    logits = rows(tokens)
    batch, single = make(policy), make(policy)
    result = batch.route_batch(logits, 1)
    singles = [single.route(row, 1) for row in logits]
    assert result.experts.tolist() == [s.experts.tolist() for s in singles]
    assert result.weights.tolist() == [s.weights.tolist() for s in singles]
    assert result.misses == {r.expert for s in singles for r in s.requests if r.expert in s.experts}
    np.testing.assert_allclose(batch.affinity.scores(1), single.affinity.scores(1), rtol=0, atol=2e-6)
    assert batch.affinity.activation_counts(1).tolist() == single.affinity.activation_counts(1).tolist()
    mine, theirs = batch.metrics.summary(), single.metrics.summary()
    assert (mine.cache_hits, mine.cache_misses) == (theirs.cache_hits, theirs.cache_misses)
    assert mine.routing_decisions == theirs.routing_decisions == tokens
    assert mine.selections_changed == theirs.selections_changed
    assert mine.lost_mass == pytest.approx(theirs.lost_mass, abs=1e-6)


def test_layers_are_apart() -> None:
    router = make()
    router.route_batch(rows(5), 1)
    assert router.affinity.activation_counts(0).sum() == 0
    assert router.affinity.activation_counts(1).sum() == 20
    assert router.resident_experts(0) == []


def test_an_empty_batch_changes_nothing() -> None:
    router = make()
    result = router.route_batch(rows(0), 1)
    assert result.experts.shape == (0, 4) and result.misses == frozenset()
    assert router.affinity.snapshot()[1].max() == 0
    assert result.changed_share == 0.0


def test_a_result_unpacks_into_experts_weights_and_misses() -> None:
    result = make().route_batch(rows(3), 1)
    experts, weights, misses = result
    assert experts is result.experts and weights is result.weights and misses is result.misses
    assert (experts.dtype, weights.dtype) == (np.int32, np.float32)


class TestEpochs:
    def test_by_default_one_per_token(self) -> None:
        router = make()
        router.route_batch(rows(10), 1)
        assert router.affinity.snapshot()[1][1].max() == 10

    def test_a_step_is_one_and_boosts_each_expert_once(self) -> None:
        law = AffinityConfig(32, 0.5, 0.25, 1.0)
        router = MemoryAwareRouter(RouterConfig(32, 4, affinity=law))
        used = set(router.route_batch(rows(10), epochs=1).experts.ravel().tolist())
        assert {e for e in range(32) if router.affinity.score(e) > 0} == used
        assert all(router.affinity.score(e) == pytest.approx(0.25, abs=1e-6) for e in used)
        assert router.affinity.activation_counts().sum() == 40  # counts are of selections all the same

    def test_a_further_batch_of_the_step_does_not_decay(self) -> None:
        law = AffinityConfig(32, 0.5, 0.25, 1.0)
        router = MemoryAwareRouter(RouterConfig(32, 4, affinity=law))
        first = set(router.route_batch(rows(1, 1), epochs=1).experts.ravel().tolist())
        second = set(router.route_batch(rows(1, 2), epochs=0).experts.ravel().tolist())
        for expert in first | second:
            expected = 0.25 * ((expert in first) + (expert in second))
            assert router.affinity.score(expert) == pytest.approx(expected, abs=1e-6)


class TestPerTokenStrength:
    @pytest.mark.parametrize("policy", ["bonus", "range", "mass", "resnorm", "substitute"])
    def test_zero_is_off_for_that_token(self, policy: Policy) -> None:
        logits = rows(40)
        strength = np.where(np.arange(40) % 2 == 0, 0, 0.8).astype(np.float32)
        mixed = make(policy).route_batch(logits, 1, strength=strength)
        off = make("off").route_batch(logits, 1)
        strong = make(policy).route_batch(logits, 1, strength=0.8)
        assert mixed.experts[::2].tolist() == off.experts[::2].tolist()
        assert mixed.experts[1::2].tolist() == strong.experts[1::2].tolist()
        assert mixed.weights[::2].tolist() == off.weights[::2].tolist()

    def test_a_residual_ratio_multiplies_the_strength(self) -> None:
        logits, ratios = rows(40), np.linspace(0, 4, 40, dtype=np.float32)
        given = make("resnorm").route_batch(logits, 1, strength=0.2, residual_ratio=ratios)
        expected = make("resnorm").route_batch(logits, 1, strength=np.float32(0.2) * ratios)
        assert given.experts.tolist() == expected.experts.tolist()
        configured = MemoryAwareRouter(RouterConfig(32, 4, resnorm_strength=0.2), num_layers=2)
        configured.update_cache_state(RESIDENT, layer=1)
        assert configured.route_batch(logits, 1, policy="resnorm", residual_ratio=ratios).experts.tolist() == (
            expected.experts.tolist()
        )

    def test_batches_longer_than_the_kernels_chunk(self) -> None:
        logits = rows(2500)
        strength = np.linspace(0, 1, 2500, dtype=np.float32)
        whole = make().route_batch(logits, 1, strength=strength)
        for row in (0, 1023, 1024, 2499):
            alone = make().route(logits[row], 1, strength=float(strength[row]))
            assert alone.experts.tolist() == whole.experts[row].tolist()


def outputs(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(shape, -1, np.int32), np.full(shape, -1, np.float32)


class TestBoundCalls:
    def test_one_row(self) -> None:
        logits, (experts, weights) = rows(1)[0], outputs(4)
        bound = make().bind(logits, experts, weights, 1)
        for seed in (0, 1):
            logits[:] = rows(1, seed)[0]  # what it holds at the time of the call counts
            expected = make().route(logits, 1)
            missing = bound()
            assert experts.tolist() == expected.experts.tolist()
            assert weights.tolist() == expected.weights.tolist()
            assert missing == len(set(experts.tolist()) - set(RESIDENT))

    def test_any_row_of_many(self) -> None:
        logits, (experts, weights) = rows(9), outputs(4)
        bound = make().bind(logits, experts, weights, 1)
        for row in (8, 0, 3):
            bound(row)
            assert experts.tolist() == make().route(logits[row], 1).experts.tolist()

    @pytest.mark.parametrize("arguments", [(), (5,), (0,)])
    def test_the_first_rows_of_a_batch(self, arguments: tuple[int, ...]) -> None:
        logits, (experts, weights) = rows(9), outputs(9, 4)
        count = arguments[0] if arguments else 9
        missing = make().bind(logits, experts, weights, 1)(*arguments)
        expected = make().route_batch(logits[:count], 1)
        assert experts[:count].tolist() == expected.experts.tolist()
        assert (experts[count:] == -1).all() and (weights[count:] == -1).all()
        assert missing == len(expected.misses)

    def test_its_own_policy_and_strength(self) -> None:
        logits, (experts, weights) = rows(9), outputs(9, 4)
        make().bind(logits, experts, weights, 1, policy="mass", strength=0.3)()
        expected = make().route_batch(logits, 1, policy="mass", strength=0.3)
        assert experts.tolist() == expected.experts.tolist()

    def test_keeps_the_router_and_its_arrays_alive(self) -> None:
        def bound() -> Callable[..., int]:
            return make().bind(rows(9), *outputs(9, 4), 1)

        assert bound()() > 0
