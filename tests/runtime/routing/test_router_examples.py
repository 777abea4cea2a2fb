"""The examples of the specification, one by one, on private memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hotset.runtime import MemoryAwareRouter, PagingPriority, RouterConfig


def make_router(
    experts: int, k: int, bonus: float, resident: Sequence[int], *, aware: bool = True
) -> MemoryAwareRouter:
    router = MemoryAwareRouter(RouterConfig(num_experts=experts, top_k=k, cache_bonus=bonus, memory_aware=aware))
    router.update_cache_state(resident)
    return router


@pytest.mark.parametrize(
    ("k", "bonus", "resident", "aware", "logits", "selected"),
    [
        (2, 0.0, [], True, [0.1, 0.3, 0.5, 0.2, 0.4, 0.1, 0.2, 0.15], [2, 4]),
        (1, 0.3, [1], True, [0.4, 0.3, 0.2, 0.1], [1]),
        (3, 0.0, [], True, [0.8, 0.1, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5], [0, 3, 5]),
        (2, 0.0, [], True, [0.5, 0.5, 0.5, 0.5], [0, 1]),
        (2, 0.0, [0], True, [0.5, 0.6, 0.4, 0.3], [1, 0]),
        (2, 0.5, [3], False, [0.4, 0.3, 0.5, 0.2], [2, 0]),
    ],
)
def test_selection(
    k: int, bonus: float, resident: list[int], aware: bool, logits: list[float], selected: list[int]
) -> None:
    router = make_router(len(logits), k, bonus, resident, aware=aware)
    assert router.route(np.array(logits, np.float32)).experts.tolist() == selected


def test_one_urgent_request_for_each_selected_expert_that_is_not_resident() -> None:
    router = make_router(4, 2, 0.0, [0])
    requests = router.route(np.array([0.5, 0.6, 0.4, 0.3], np.float32), layer=0).requests
    assert [(r.expert, r.layer) for r in requests if r.priority is PagingPriority.URGENT] == [(1, 0)]


def test_prefetches_follow_for_probable_experts_that_were_not_selected() -> None:
    router = MemoryAwareRouter(RouterConfig(4, 1, prefetch_threshold=0.2))
    router.set_resident(3, True)
    logits = np.log(np.array([0.4, 0.3, 0.1, 0.2], np.float32))
    requests = router.route(logits, policy="off").requests
    assert [(r.expert, r.priority) for r in requests] == [(0, PagingPriority.URGENT), (1, PagingPriority.PREFETCH)]


def test_the_two_steps_on_their_own() -> None:
    router = make_router(4, 2, 0.2, [1, 2])
    adjusted = router.apply_cache_bonus(np.array([0.1, 0.3, 0.4, 0.5], np.float32))
    assert adjusted.tolist() == pytest.approx([0.1, 0.5, 0.6, 0.5])
    assert router.select_top_k(adjusted).tolist() == [2, 1]


def test_weights_never_see_the_bonus() -> None:
    logits = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    router = make_router(4, 2, 1.0, [2, 3])
    result = router.route(logits)
    assert result.experts.tolist() == [2, 3]
    expected = np.exp(logits[[2, 3]].astype(float)) / np.exp(logits.astype(float)).sum()
    np.testing.assert_allclose(result.weights, expected, rtol=0, atol=1e-6)


def test_sigmoid_gates_select_within_the_best_groups() -> None:
    """Four groups of two: the sums of their scores favour the groups {0, 1} and {4, 5}, not expert 3's."""
    logits = np.array([2.0, 1.0, -9.0, 2.5, 1.5, 1.4, -1.0, -1.0], np.float32)
    config = RouterConfig(8, 3, gating="sigmoid", num_groups=4, top_groups=2, renormalize=True, weight_scale=2.0)
    result = MemoryAwareRouter(config).route(logits)
    assert result.experts.tolist() == [0, 4, 5]
    scores = 1 / (1 + np.exp(-logits[[0, 4, 5]].astype(float)))
    np.testing.assert_allclose(result.weights, 2 * scores / scores.sum(), rtol=0, atol=2e-6)


def test_sigmoid_without_groups_selects_and_weighs_by_score() -> None:
    logits = np.array([3.0, -2.0, 0.5, 1.0], np.float32)
    result = MemoryAwareRouter(RouterConfig(4, 2, gating="sigmoid", renormalize=True)).route(logits)
    scores = 1 / (1 + np.exp(-logits[[0, 3]].astype(float)))
    assert result.experts.tolist() == [0, 3]
    np.testing.assert_allclose(result.weights, scores / scores.sum(), rtol=0, atol=1e-6)
