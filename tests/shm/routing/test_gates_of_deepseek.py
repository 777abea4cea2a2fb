"""Gates that select by other scores than they weigh by, and within groups: every kernel as plain numpy has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from routing_reference import exchange_within_mass, group_limited, ranking, substitute

from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RouterConfig

EXPERTS, K, ROWS = 24, 4, 5
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Floats = np.ndarray


class Gate:
    """A case: logits of some rows, a bias, groups, and what is resident."""

    def __init__(self, seed: int, gating: str, groups: int, top_groups: int) -> None:
        random = np.random.default_rng(seed)
        self.sigmoid = gating == "sigmoid"
        self.rows = (2 * random.standard_normal((ROWS, EXPERTS))).astype(np.float32)
        self.bias = (0.3 * random.standard_normal((2, EXPERTS))).astype(np.float32) if self.sigmoid else None
        self.groups, self.top_groups = groups, top_groups
        self.mask = random.random(EXPERTS) < 0.4
        self.options: dict[str, Any] = {"gating": gating, "num_groups": groups, "top_groups": top_groups}

    def router(self, **options: Any) -> MemoryAwareRouter:
        config = RouterConfig(EXPERTS, K, **self.options, **options)
        router = MemoryAwareRouter(config, num_layers=2, selection_bias=self.bias)
        router.update_cache_state(np.flatnonzero(self.mask).tolist(), layer=1)
        return router

    def weights(self, row: Floats) -> Floats:
        """Not normalised over the selection."""
        wide = row.astype(np.float64)
        return 1 / (1 + np.exp(-wide)) if self.sigmoid else np.exp(wide) / np.exp(wide).sum()

    def scores(self, row: Floats) -> Floats:
        """NaN in groups that are left out. Rejects what float32 may order otherwise."""
        wide = row.astype(np.float64)
        scores = wide if self.bias is None else self.weights(row) + self.bias[1]
        limited, groups = group_limited(scores, self.groups, self.top_groups, by_two=self.sigmoid)
        assume(all(np.diff(np.sort(values)).min(initial=1) > 1e-5 for values in (scores, groups)))
        return limited


gates = st.builds(
    lambda seed, gating, groups: Gate(seed, gating, *groups),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["sigmoid", "softmax_top_k"]),
    st.sampled_from([(1, 1), (4, 2), (6, 1), (8, 3), (12, 12)]),
)


@pytest.mark.usefixtures("kernel")
class TestSelection:
    @SETTINGS
    @given(gates, st.booleans())
    def test_the_true_top_k_and_its_weights(self, gate: Gate, renormalize: bool) -> None:
        result = gate.router(policy="off", renormalize=renormalize, weight_scale=2.5).route_batch(gate.rows, 1)
        for row, experts, weights in zip(gate.rows, result.experts, result.weights, strict=True):
            assert experts.tolist() == ranking(gate.scores(row))[:K]
            expected = gate.weights(row)[experts]
            expected = expected / expected.sum() if renormalize else expected
            np.testing.assert_allclose(weights, 2.5 * expected, rtol=2e-6)

    @SETTINGS
    @given(gates, st.sampled_from([0.0, 0.2, 1.0]))
    def test_a_bonus_on_logits_moves_groups_too(self, gate: Gate, bonus: float) -> None:
        result = gate.router(policy="bonus", cache_bonus=bonus).route_batch(gate.rows, 1)
        for row, experts in zip(gate.rows, result.experts.tolist(), strict=True):
            assert experts == ranking(gate.scores(row + np.float32(bonus) * gate.mask))[:K]

    @SETTINGS
    @given(gates, st.sampled_from([0.0, 0.1, 0.5]))
    def test_an_amount_in_units_of_the_largest_probability_within_the_groups(self, gate: Gate, strength: float) -> None:
        result = gate.router(policy="resnorm", resnorm_strength=strength).route_batch(gate.rows, 1)
        for row, experts in zip(gate.rows, result.experts.tolist(), strict=True):
            scores, weights = gate.scores(row), gate.weights(row)
            preferred = scores if gate.sigmoid else np.where(np.isnan(scores), np.nan, weights)
            preferred = preferred + strength * weights.max() * gate.mask
            assume(np.diff(np.sort(preferred[~np.isnan(preferred)])).min() > 1e-6)
            assert experts == ranking(preferred)[:K]

    @SETTINGS
    @given(gates, st.sampled_from([0.0, 0.02, 10.0]))
    def test_exchanges_within_a_budget_of_mass(self, gate: Gate, budget: float) -> None:
        result = gate.router(policy="mass", mass_budget=budget).route_batch(gate.rows, 1)
        for row, experts in zip(gate.rows, result.experts.tolist(), strict=True):
            scores, weights = gate.scores(row), gate.weights(row)
            truth = ranking(scores)[:K]
            expected, lost = exchange_within_mass(scores, truth, gate.mask, budget, weights / weights.sum())
            assume(all(abs(loss - budget) > 1e-6 for loss in lost))
            assert experts == expected

    @SETTINGS
    @given(gates, st.sampled_from([0.0, 0.1, 0.4, 10.0]), st.booleans())
    def test_replacements_that_change_the_output_little(self, gate: Gate, limit: float, renormalize: bool) -> None:
        made = gate.router(policy="substitute", substitute_limit=limit, renormalize=renormalize)
        for row, experts in zip(gate.rows, made.route_batch(gate.rows, 1).experts.tolist(), strict=True):
            scores, weights = gate.scores(row), gate.weights(row)
            truth = ranking(scores)[:K]
            weights = weights / weights[truth].sum() if renormalize else weights
            expected, changes = substitute(scores, truth, gate.mask, limit, weights, row)
            assume(all(abs(change - limit) > 1e-5 for change in changes))
            assert experts == expected

    @SETTINGS
    @given(gates, st.sampled_from(["bonus", "range", "mass", "resnorm", "substitute"]), st.booleans())
    def test_whatever_is_preferred_weights_know_neither_bias_nor_preference(
        self, gate: Gate, policy: str, renormalize: bool
    ) -> None:
        router = gate.router(policy=policy, renormalize=renormalize, weight_scale=2.5)
        result = router.route_batch(gate.rows, 1, strength=0.3)
        for row, experts, weights in zip(gate.rows, result.experts, result.weights, strict=True):
            expected = gate.weights(row)[experts]
            expected = expected / expected.sum() if renormalize else expected
            np.testing.assert_allclose(weights, 2.5 * expected, rtol=2e-6)

    @SETTINGS
    @given(gates)
    def test_the_gates_own_choice(self, gate: Gate) -> None:
        chosen = gate.router(policy="bonus", cache_bonus=1.0).true_top_k(gate.rows, 1)
        assert chosen.tolist() == [ranking(gate.scores(row))[:K] for row in gate.rows]

    @SETTINGS
    @given(gates, st.sampled_from(["bonus", "range", "mass", "resnorm", "substitute"]))
    def test_the_reported_cost_of_the_preference(self, gate: Gate, policy: str) -> None:
        result = gate.router(policy=policy).route_batch(gate.rows, 1, strength=0.5)
        lost, changed, displaced = 0.0, 0, set[int]()
        for row, experts in zip(gate.rows, result.experts.tolist(), strict=True):
            truth, weights = ranking(gate.scores(row))[:K], gate.weights(row)
            lost += (weights[truth].sum() - weights[experts].sum()) / weights.sum()
            gone = set(truth) - set(experts)
            changed += len(gone)
            displaced |= gone - set(np.flatnonzero(gate.mask).tolist())
        assert (result.changed, result.displaced) == (changed, displaced)
        assert result.lost_mass == pytest.approx(lost, abs=1e-5)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "preference",
    [
        {"policy": "bonus", "cache_bonus": 1.0},
        {"policy": "resnorm", "resnorm_strength": 0.5},
        {"policy": "substitute", "substitute_limit": 1.0},
    ],
    ids=lambda preference: preference["policy"],
)
def test_a_row_does_not_depend_on_its_batch_nor_on_how_it_is_called(preference: dict[str, Any]) -> None:
    gate = Gate(7, "sigmoid", 8, 3)
    batch = gate.router(**preference).route_batch(gate.rows, 1)
    assert batch.changed
    experts, weights = np.empty(K, np.int32), np.empty(K, np.float32)
    bound = gate.router(**preference).bind(gate.rows, experts, weights, 1)
    for index, row in enumerate(gate.rows):
        alone = gate.router(**preference).route(row, 1)
        bound(index)
        for found, expected in ((alone.experts, batch.experts), (experts, batch.experts)):
            assert found.tolist() == expected[index].tolist()
        for found, expected in ((alone.weights, batch.weights), (weights, batch.weights)):
            np.testing.assert_array_equal(found, expected[index])


def test_the_replaced_are_those_of_least_weight_and_not_those_that_the_bias_ranks_last() -> None:
    logits = np.array([[0.0, 2.0, -1.0, -2.0, 1.0]], np.float32)
    bias = np.array([[2, 1, -2, 0, -3]], np.float32)  # chosen: 0, 1
    config = RouterConfig(5, 2, gating="sigmoid", policy="substitute", substitute_limit=0.6)
    router = MemoryAwareRouter(config, selection_bias=bias)
    router.update_cache_state([2, 3, 4])
    routed = router.route_batch(logits)
    # Expert 0 has weight 0.5 and goes, 1 has 0.88 and stays, though it ranks below; 3 has the least weight of all.
    assert routed.experts.tolist() == [[1, 3]]
    np.testing.assert_allclose(routed.weights, 1 / (1 + np.exp([[-2.0, 2.0]])), rtol=1e-6)


def test_each_layer_has_its_own_bias() -> None:
    logits = np.zeros((1, 4), np.float32)
    bias = np.array([[0, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    router = MemoryAwareRouter(RouterConfig(4, 1, gating="sigmoid", policy="off"), num_layers=2, selection_bias=bias)
    bias[:] = 0  # the router has a copy
    assert [router.route_batch(logits, layer).experts.tolist() for layer in (0, 1)] == [[[2]], [[3]]]


def test_a_bias_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="only a sigmoid gate has"):
        MemoryAwareRouter(RouterConfig(4, 1), selection_bias=np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="selection_bias"):
        MemoryAwareRouter(RouterConfig(4, 1, gating="sigmoid"), selection_bias=np.zeros((1, 5), np.float32))
    with pytest.raises(TypeError, match="selection_bias"):
        MemoryAwareRouter(RouterConfig(4, 1, gating="sigmoid"), selection_bias=np.zeros((1, 4)))  # type: ignore[arg-type]


def test_not_a_number_ranks_last_and_infinity_first() -> None:
    row = np.array([[np.nan, -np.inf, 1.0, np.inf, 0.5, 2.0]], np.float32)
    result = MemoryAwareRouter(RouterConfig(6, 5, gating="sigmoid", policy="off")).route_batch(row)
    assert result.experts.tolist() == [[3, 5, 2, 4, 1]]
