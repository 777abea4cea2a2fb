"""Every kernel selects exactly what plain numpy selects, and weighs it as a float64 softmax does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from routing_reference import (
    exchange_within_mass,
    next_mean_range,
    probabilities,
    ranking,
    select,
    shares_of_largest,
    substitute,
)

from hotset.runtime.router import MemoryAwareRouter
from hotset.runtime.router_config import RouterConfig

Row = list[float]
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture only names the kernel

ORDINARY = st.floats(-30, 30, width=32)
TIED = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 0.5000000596046448, 2.0])
ANYTHING = st.floats(width=32)  # NaN, infinities, denormals, the largest numbers
DENORMAL = st.floats(-(2.0**-126), 2.0**-126, width=32)


@st.composite
def cases(draw: st.DrawFn, elements: st.SearchStrategy[float] | None = None) -> tuple[np.ndarray, int, list[int]]:
    """(rows float32 [n, experts], top_k, resident)."""
    experts = draw(st.one_of(st.integers(1, 40), st.sampled_from([60, 64, 128, 129, 256])))
    k = draw(st.integers(1, min(experts, 12)))
    values = draw(st.sampled_from([ORDINARY, TIED, ANYTHING, DENORMAL])) if elements is None else elements
    if experts > 40:  # hypothesis draws few values, a generator the rest
        pool = draw(st.lists(values, min_size=3, max_size=12))
        picks = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, len(pool), (2, experts))
        rows = np.array(pool, np.float32)[picks]
    else:
        row = st.lists(values, min_size=experts, max_size=experts)
        rows = np.array(draw(st.lists(row, min_size=1, max_size=3)), np.float32)
    if draw(st.booleans()):  # one row is routed in another way than many, and many end in the middle of a tile
        rows = np.stack([np.roll(rows[i % len(rows)], i) for i in range(19)])
    resident = draw(st.sets(st.integers(0, experts - 1)))
    return rows, k, sorted(resident)


def has_finite(rows: np.ndarray) -> bool:
    return bool(np.isfinite(rows).any(axis=1).all())


def router(rows: np.ndarray, k: int, resident: list[int], **options: object) -> MemoryAwareRouter:
    made = MemoryAwareRouter(RouterConfig(rows.shape[1], k, **options))  # type: ignore[arg-type]
    made.update_cache_state(resident)
    return made


@pytest.mark.usefixtures("kernel")
class TestSelection:
    @SETTINGS
    @given(cases())
    def test_the_true_top_k(self, case: tuple[np.ndarray, int, list[int]]) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        result = router(rows, k, resident, policy="off").route_batch(rows)
        assert result.experts.tolist() == [ranking(row)[:k] for row in rows]
        assert result.changed == 0 and result.lost_mass == 0

    @SETTINGS
    @given(cases())
    def test_the_gates_choice_whatever_is_preferred(self, case: tuple[np.ndarray, int, list[int]]) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        made = router(rows, k, resident, cache_bonus=1.0)
        assert made.true_top_k(rows).tolist() == [ranking(row)[:k] for row in rows]
        assert made.metrics.summary().routing_decisions == made.metrics.summary().nan_logits == 0

    @SETTINGS
    @given(cases(), st.floats(0, 1, width=32))
    def test_a_constant_bonus(self, case: tuple[np.ndarray, int, list[int]], bonus: float) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        result = router(rows, k, resident, policy="bonus", cache_bonus=bonus).route_batch(rows)
        assert result.experts.tolist() == [select(row, k, resident, "bonus", bonus) for row in rows]

    @SETTINGS
    @given(cases(), st.floats(0, 1, width=32), st.integers(0, 2))
    def test_a_bonus_in_units_of_the_running_range(
        self, case: tuple[np.ndarray, int, list[int]], strength: float, keep_top: int
    ) -> None:
        rows, k, resident = case
        assume(has_finite(rows) and keep_top <= k)
        made = router(rows, k, resident, policy="range", range_strength=strength, keep_top=keep_top)
        result = made.route_batch(rows)
        mean = np.float32(0)
        for row, experts in zip(rows, result.experts.tolist(), strict=True):
            mean = next_mean_range(mean, row)
            assert experts == select(row, k, resident, "range", strength, keep_top=keep_top, mean_range=mean)

    @SETTINGS
    @given(cases(), st.sampled_from([0.0, 0.001, 0.01, 0.1, 1.0]))
    def test_exchanges_within_a_budget_of_mass(self, case: tuple[np.ndarray, int, list[int]], budget: float) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        mask = np.isin(np.arange(rows.shape[1]), resident)
        expected: list[list[int]] = []
        for row in rows:
            experts, lost = exchange_within_mass(row, ranking(row)[:k], mask, budget)
            assume(all(abs(loss - budget) > 1e-6 for loss in lost))  # float32 cannot tell which side it is on
            expected.append(experts)
        result = router(rows, k, resident, policy="mass", mass_budget=budget).route_batch(rows)
        assert result.experts.tolist() == expected
        assert result.lost_mass <= budget * len(rows) + 1e-5

    @SETTINGS
    @given(cases(), st.sampled_from([0.0, 0.02, 0.1, 0.3, 2.0]), st.booleans())
    def test_replacements_that_change_the_output_little(
        self, case: tuple[np.ndarray, int, list[int]], limit: float, renormalize: bool
    ) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        mask = np.isin(np.arange(rows.shape[1]), resident)
        expected: list[list[int]] = []
        for row in rows:
            truth, weights = ranking(row)[:k], probabilities(row)
            assume(weights[truth].sum() > 0)
            weights = weights / weights[truth].sum() if renormalize else weights
            experts, changes = substitute(row, truth, mask, limit, weights)
            assume(limit == 0 or all(abs(change - limit) > 1e-6 for change in changes))
            expected.append(experts)
        made = router(rows, k, resident, policy="substitute", substitute_limit=limit, renormalize=renormalize)
        assert made.route_batch(rows).experts.tolist() == expected

    @SETTINGS
    @given(cases(), st.sampled_from([0.0, 0.01, 0.1, 0.5, 2.0]))
    def test_an_amount_in_units_of_the_largest_probability(
        self, case: tuple[np.ndarray, int, list[int]], strength: float
    ) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        mask = np.isin(np.arange(rows.shape[1]), resident)
        for row in rows:  # float32 cannot tell which of two that are this close comes first
            shares = shares_of_largest(row)
            between = shares[mask][:, np.newaxis] + np.float32(strength) - shares[~mask]
            assume(strength == 0 or bool(np.all(np.abs(between) > 1e-6)))
        result = router(rows, k, resident, policy="resnorm", resnorm_strength=strength).route_batch(rows)
        assert result.experts.tolist() == [select(row, k, resident, "resnorm", np.float32(strength)) for row in rows]

    @SETTINGS
    @given(cases(), st.lists(st.sampled_from([0.0, 0.02, 0.3, 1.5]), min_size=19, max_size=19))
    def test_a_strength_of_each_row(self, case: tuple[np.ndarray, int, list[int]], strengths: list[float]) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        each = np.array(strengths[: len(rows)], np.float32)
        result = router(rows, k, resident, policy="resnorm").route_batch(rows, strength=each)
        for row, strength, experts in zip(rows, each, result.experts.tolist(), strict=True):
            alone = router(row[np.newaxis], k, resident, policy="resnorm").route(row, strength=float(strength))
            assert experts == alone.experts.tolist()
            assert strength > 0 or experts == ranking(row)[:k]

    @SETTINGS
    @given(cases())
    def test_weights_are_those_of_the_unmodified_logits(self, case: tuple[np.ndarray, int, list[int]]) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        result = router(rows, k, resident, cache_bonus=0.5).route_batch(rows)
        for row, experts, weights in zip(rows, result.experts, result.weights, strict=True):
            np.testing.assert_allclose(weights, probabilities(row)[experts], rtol=0, atol=1e-6)

    @SETTINGS
    @given(cases(ORDINARY), st.sampled_from(["softmax_top_k", "top_k_softmax"]))
    def test_renormalised_weights(self, case: tuple[np.ndarray, int, list[int]], gating: str) -> None:
        rows, k, resident = case
        made = router(rows, k, resident, cache_bonus=0.5, gating=gating, renormalize=True, weight_scale=2.5)
        result = made.route_batch(rows)
        for row, experts, weights in zip(rows, result.experts, result.weights, strict=True):
            np.testing.assert_allclose(weights, 2.5 * probabilities(row[experts]), rtol=0, atol=2.5e-6)

    @SETTINGS
    @given(cases(), st.sampled_from(["bonus", "range", "mass", "resnorm", "substitute"]))
    def test_the_reported_cost_of_the_preference(self, case: tuple[np.ndarray, int, list[int]], policy: str) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        result = router(rows, k, resident, policy=policy).route_batch(rows, strength=1.0)
        lost, changed, displaced = 0.0, 0, set[int]()
        for row, experts in zip(rows, result.experts.tolist(), strict=True):
            truth, share = ranking(row)[:k], probabilities(row)
            lost += share[truth].sum() - share[experts].sum()
            gone = set(truth) - set(experts)
            changed += len(gone)
            displaced |= gone - set(resident)
        assert result.changed == changed
        assert result.displaced == displaced
        assert result.lost_mass == pytest.approx(lost, abs=1e-6 * len(rows))
        assert result.misses == {e for row in result.experts.tolist() for e in row} - set(resident)

    @SETTINGS
    @given(cases(), st.floats(0, 1, width=32))
    def test_prefetches_are_the_probable_ones_left_out(
        self, case: tuple[np.ndarray, int, list[int]], threshold: float
    ) -> None:
        rows, k, resident = case
        assume(has_finite(rows))
        result = router(rows, k, resident, prefetch_threshold=threshold).route_batch(rows, prefetch=True)
        expected: set[int] = set()
        for row, experts in zip(rows, result.experts.tolist(), strict=True):
            share = probabilities(row)
            assume(bool(np.all(np.abs(share - threshold) > 1e-6)))
            expected |= set(np.flatnonzero(share >= threshold).tolist()) - set(experts) - set(resident)
        assert result.prefetches == expected


@pytest.mark.usefixtures("kernel")
class TestRowsWithoutFiniteLogit:
    @pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
    @pytest.mark.parametrize("experts", [8, 60, 64])
    def test_get_the_lowest_ids_and_equal_weights_and_are_counted(self, value: float, experts: int) -> None:
        made = MemoryAwareRouter(RouterConfig(experts, 4))
        made.set_resident(7, True)
        result = made.route_batch(np.full((2, experts), value, np.float32))
        assert result.experts.tolist() == [[0, 1, 2, 3]] * 2
        assert result.weights.tolist() == [[0.25] * 4] * 2
        assert made.metrics.summary().rows_without_finite_logit == 2

    def test_infinity_is_still_the_largest(self) -> None:
        row = np.full((1, 16), np.nan, np.float32)
        row[0, [5, 9]] = np.inf, -np.inf
        result = MemoryAwareRouter(RouterConfig(16, 3)).route_batch(row)
        assert result.experts.tolist() == [[5, 9, 0]]

    def test_nan_is_counted_and_ranks_last(self) -> None:
        made = MemoryAwareRouter(RouterConfig(64, 64 // 2))
        row = np.full((1, 64), -1e30, np.float32)
        row[0, ::2] = np.nan
        assert made.route_batch(row).experts.tolist() == [list(range(1, 64, 2))]
        assert made.metrics.summary().nan_logits == 32


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (8, 2), (33, 32), (128, 8), (512, 10), (1000, 9), (1024, 32)])
def test_every_size_of_gate(experts: int, k: int) -> None:
    rows = np.random.default_rng(experts).normal(size=(50, experts)).astype(np.float32)
    resident = list(range(0, experts, 3))
    result = router(rows, k, resident).route_batch(rows)
    assert result.experts.tolist() == [select(row, k, resident, "bonus", 0.15) for row in rows]
