"""Bad input is one sentence naming what was given and what was expected, and it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hotset.runtime import MemoryAwareRouter, MoeMetrics, RouterConfig


def float32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.fixture
def router() -> MemoryAwareRouter:
    return MemoryAwareRouter(RouterConfig(8, 2), num_layers=3)


def bind(router: MemoryAwareRouter, **replaced: Any) -> Callable[..., int]:
    arrays = {"logits": float32(4, 8), "experts": np.zeros((4, 2), np.int32), "weights": float32(4, 2)}
    return router.bind(**{**arrays, **replaced})


CALLS: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda r: r.route(float32(7)), ValueError, r"logits has shape \(7,\), expected \(8,\)"),
    (lambda r: r.route(float32(1, 8)), ValueError, r"logits has shape \(1, 8\), expected \(8,\)"),
    (lambda r: r.route(np.zeros(8)), TypeError, "logits has dtype float64, expected float32"),
    (lambda r: r.route_batch(float32(4, 7)), ValueError, r"logits has shape \(4, 7\), expected \(n, 8\)"),
    (lambda r: r.route_batch(float32(8)), ValueError, r"logits has shape \(8,\), expected \(n, 8\)"),
    (lambda r: r.route_batch(np.zeros((4, 8), np.float16)), TypeError, "logits has dtype float16, expected float32"),
    (lambda r: r.route_batch(float32(8, 4).T), ValueError, r"logits is not contiguous, expected .* shape \(n, 8\)"),
    (lambda r: r.route_batch(float32(4, 16)[:, ::2]), ValueError, "logits is not contiguous"),
    (lambda r: r.route_batch([[0.0] * 8]), TypeError, r"logits is a list, expected a float32 array of shape \(n, 8\)"),  # type: ignore[arg-type]
    (lambda r: r.route_batch(float32(4, 8), 3), IndexError, "layer is 3, expected 0 <= layer < 3"),
    (lambda r: r.route_batch(float32(4, 8), -1), IndexError, "layer is -1, expected 0 <= layer < 3"),
    (lambda r: r.route_batch(float32(4, 8), policy="best"), ValueError, "policy is 'best', expected one of off, bonus"),  # type: ignore[arg-type]
    (
        lambda r: r.route_batch(float32(4, 8), residual_ratio=float32(4)),
        ValueError,
        "residual_ratio is given with policy 'bonus', expected one of resnorm, substitute",
    ),
    (
        lambda r: r.route_batch(float32(4, 8), policy="resnorm", residual_ratio=float32(3)),
        ValueError,
        r"strength has shape \(3,\), expected \(4,\)",
    ),
    (lambda r: r.route_batch(float32(4, 8), epochs=2), ValueError, "epochs is 2, expected None .* 1 .* or 0"),  # type: ignore[arg-type]
    (lambda r: r.route_batch(float32(4, 8), strength=-0.5), ValueError, "strength is negative or not finite"),
    (
        lambda r: r.route_batch(float32(4, 8), strength=float32(3)),
        ValueError,
        r"strength has shape \(3,\), expected \(4,\)",
    ),
    (
        lambda r: bind(r, experts=np.zeros((4, 3), np.int32)),
        ValueError,
        r"experts has shape \(4, 3\), expected \(4, 2\)",
    ),
    (lambda r: bind(r, experts=np.zeros((4, 2), np.int64)), TypeError, "experts has dtype int64, expected int32"),
    (lambda r: bind(r, experts=read_only(np.zeros((4, 2), np.int32))), ValueError, "experts is read-only"),
    (
        lambda r: bind(r, weights=read_only(float32(4, 2))),
        ValueError,
        "weights is read-only, expected a writable array",
    ),
    (lambda r: bind(r, weights=np.zeros((4, 2))), TypeError, "weights has dtype float64, expected float32"),
    (lambda r: bind(r, weights=float32(2)), ValueError, r"weights has shape \(2,\), expected \(4, 2\)"),
    (lambda r: bind(r, logits=float32(4, 9)), ValueError, r"logits has shape \(4, 9\), expected \(n, 8\)"),
    (lambda r: bind(r)(5), IndexError, "rows is 5, expected 0 <= rows < 5"),
    (
        lambda r: bind(r, experts=np.zeros(2, np.int32), weights=float32(2))(4),
        IndexError,
        "row is 4, expected 0 <= row < 4",
    ),
    (lambda r: bind(r, experts=np.zeros(2, np.int32), weights=float32(2))(), TypeError, "expected 1 arguments, got 0"),
    (lambda r: r.set_resident(8, True), ValueError, "expert id is 8, expected 0 <= id < 8"),
    (lambda r: r.update_cache_state([1, -1]), ValueError, "expert id is -1, expected 0 <= id < 8"),
    (lambda r: r.affinity.update([0, 8]), ValueError, "expert id is 8, expected 0 <= id < 8"),
    (lambda r: r.update_cache_state(3), ValueError, "ids is 3, expected several integers"),
    (lambda r: r.update_cache_state("x"), ValueError, "ids is 'x', expected several integers"),
    (lambda r: r.update_cache_state([1], 10**30), IndexError, f"layer is {10**30}, expected 0 <= layer < 3"),
    (lambda r: r.is_resident([1]), ValueError, r"expert id is \[1\], expected an integer"),
    (lambda r: r.is_resident("x"), ValueError, "expert id is 'x', expected an integer"),
    (lambda r: r.is_resident(1, 3), IndexError, "layer is 3, expected 0 <= layer < 3"),
    (lambda r: r.generate_prefetch_requests("x"), ValueError, "budget is 'x', expected an integer"),
    (lambda r: r.generate_prefetch_requests(1.5), ValueError, "budget is 1.5, expected an integer"),
    (lambda r: r.generate_prefetch_requests(1, "x"), ValueError, "layer is 'x', expected an integer"),
    (lambda r: r.generate_prefetch_requests(1, True), ValueError, "layer is True, expected an integer"),
    (lambda r: r.generate_prefetch_requests(1, 3), IndexError, "layer is 3, expected 0 <= layer < 3"),
    (lambda r: bind(r)("x"), ValueError, "rows is 'x', expected an integer"),
    (lambda r: bind(r)(10**30), IndexError, f"rows is {10**30}, expected 0 <= rows < 5"),
    (lambda r: bind(r, epochs=[1]), ValueError, r"epochs is \[1\], expected None .* 1 .* or 0"),
    (lambda r: bind(r, policy=float32(2)), ValueError, r"policy is array\(.*\), expected one of off, bonus"),
    (lambda r: r.route_batch(float32(4, 8), prefetch="x"), ValueError, "prefetch is 'x', expected an integer"),
    (
        lambda r: r.route_batch(float32(4, 8), policy="resnorm", residual_ratio="x"),
        ValueError,
        "residual_ratio is 'x', expected float32 of shape .tokens,.",
    ),
    (
        lambda r: r.foresee(float32(4, 8), policy="substitute", residual_ratio={}),
        ValueError,
        "residual_ratio is {}, expected float32 of shape .tokens,.",
    ),
    (
        lambda r: r.route_batch(float32(4, 8), policy="resnorm", strength="x", residual_ratio=float32(4)),
        ValueError,
        "strength is 'x', expected a number or float32 of shape .tokens,.",
    ),
    (
        lambda r: r.route_batch(float32(4, 8), policy="resnorm", strength=float32(3), residual_ratio=float32(4)),
        ValueError,
        "strength .* expected",
    ),
    (lambda r: r.metrics.record_page_in("x"), ValueError, "nanoseconds is 'x', expected an integer"),
    (lambda r: r.metrics.percentiles("x"), ValueError, "histogram is 'x', expected an integer"),
    (lambda r: MoeMetrics("x"), ValueError, "segment is 'x', expected one of class Segment"),
    (lambda r: MoeMetrics(r._segment, "x"), ValueError, "process is 'x', expected an integer of at least 0"),
    (lambda r: r.select_top_k(float32(9)), ValueError, r"scores has shape \(9,\), expected \(8,\)"),
    (lambda r: r.apply_cache_bonus(float32(9)), ValueError, r"scores has shape \(9,\), expected \(8,\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_refused_and_nothing_changed(
    router: MemoryAwareRouter, call: Callable[[MemoryAwareRouter], Any], error: type[Exception], message: str
) -> None:
    router.update_cache_state([2, 5])
    router.route_batch(np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32))
    before = state(router)
    with pytest.raises(error, match=message):
        call(router)
    assert state(router) == before


def state(router: MemoryAwareRouter) -> tuple[Any, ...]:
    summary = router.metrics.summary()
    scores, epochs = router.affinity.snapshot()
    return (
        summary.routing_decisions,
        summary.cache_hits,
        summary.cache_misses,
        scores.tolist(),
        epochs.tolist(),
        router.affinity.activation_counts().tolist(),
        router.resident_experts(),
    )


def test_ids_out_of_range_are_not_resident(router: MemoryAwareRouter) -> None:
    assert not router.is_resident(8)
    assert not router.is_resident(-1)


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.route_batch(float32(4, 8)),
        lambda r: r.bind(float32(8), np.zeros(2, np.int32), float32(2)),
        lambda r: r.resident_experts(),
        lambda r: r.metrics.summary(),
        lambda r: r.affinity.snapshot(),
    ],
)
def test_a_closed_arena_is_refused(router: MemoryAwareRouter, call: Callable[[MemoryAwareRouter], Any]) -> None:
    router.close()
    router.close()
    with pytest.raises(ValueError, match="the arena is closed"):
        call(router)


def test_a_bound_call_after_closing_is_refused(router: MemoryAwareRouter) -> None:
    bound = bind(router)
    bound()
    router.close()
    with pytest.raises(ValueError, match="the arena is closed"):
        bound()


def test_the_affinity_of_another_number_of_experts_is_refused(router: MemoryAwareRouter) -> None:
    with pytest.raises(ValueError, match="num_experts is 9, expected 8 as in the arena"):
        MemoryAwareRouter(RouterConfig(9, 2), segment=router._segment)
