"""What a router or an affinity is made from is named when it is wrong, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hotset.runtime import MemoryAwareRouter, RouterConfig
from hotset.runtime.affinity import AffinityConfig, ExpertAffinity

ROUTER: Any = MemoryAwareRouter
AFFINITY: Any = ExpertAffinity


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ROUTER("x"), "config is 'x', expected one of class RouterConfig"),
        (lambda: ROUTER(RouterConfig(8, 2), num_layers="2"), "num_layers is '2', expected an integer of at least 1"),
        (lambda: ROUTER(RouterConfig(8, 2), process=-1), "process is -1, expected an integer of at least 0"),
        (lambda: AFFINITY(8), "config is 8, expected one of class AffinityConfig"),
        (lambda: AFFINITY(AffinityConfig(8), num_layers=0), "num_layers is 0, expected an integer of at least 1"),
        (lambda: ROUTER(), "MemoryAwareRouter is given no config, expected RouterConfig(...)"),
        (lambda: AFFINITY(), "ExpertAffinity is given no config, expected AffinityConfig(...)"),
        (
            lambda: AFFINITY(8, decay=2),
            "ExpertAffinity is given decay=2, expected config=AffinityConfig(decay=2)",
        ),
        (
            lambda: ROUTER(num_experts=8, top_k=2),
            "MemoryAwareRouter is given num_experts=8, top_k=2, expected config=RouterConfig(num_experts=8, top_k=2)",
        ),
        (
            lambda: ROUTER(RouterConfig(8, 2), layers=2),
            "MemoryAwareRouter is given layers=2, expected config, num_layers, segment, process, selection_bias",
        ),
        (
            lambda: AFFINITY(AffinityConfig(8), 2),
            "ExpertAffinity: too many positional arguments, expected config, num_layers, segment, process",
        ),
        (lambda: ROUTER(RouterConfig(8, 2), segment="x"), "segment is 'x', expected one of class Segment"),
        (lambda: AFFINITY(AffinityConfig(8), segment="x"), "segment is 'x', expected one of class Segment"),
    ],
)
def test_a_wrong_argument_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("logits", ["x", b"x", {1: 2}, object(), ["a"] * 8, [[1], [1, 2]]])
def test_logits_that_are_no_numbers_are_named(logits: Any) -> None:
    router = MemoryAwareRouter(RouterConfig(8, 2))
    for route, name in ((router.route, "logits"), (router.select_top_k, "scores")):
        with pytest.raises(ValueError) as caught:
            route(logits)
        assert str(caught.value) == f"{name} is {logits!r}, expected 8 numbers"


@pytest.mark.parametrize("layer", ["x", None, 1.5, [0]])
def test_a_layer_that_is_no_number_is_named(layer: Any) -> None:
    router: Any = MemoryAwareRouter(RouterConfig(8, 2))
    affinity = ExpertAffinity(AffinityConfig(8))
    logits = np.zeros((1, 8), np.float32)
    for use in (
        lambda: router.route([0.0] * 8, layer),
        lambda: router.route_batch(logits, layer),
        lambda: router.bind(logits, np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32), layer),
        lambda: router.true_top_k(logits, layer),
        lambda: router.foresee(logits, layer),
        lambda: router.apply_cache_bonus([0.0] * 8, layer),
        lambda: router.update_cache_state([1], layer),
        lambda: router.set_resident(1, True, layer),
        lambda: router.is_resident(1, layer),
        lambda: router.resident_experts(layer),
        lambda: affinity.update([1], layer),
        lambda: affinity.score(1, layer),
        lambda: affinity.activation_counts(layer),
        lambda: affinity.least_affinity([1], layer),
    ):
        with pytest.raises(ValueError) as caught:
            use()
        assert str(caught.value) == f"layer is {layer!r}, expected an integer"


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda affinity: affinity.update("x"), "ids is 'x', expected several integers"),
        (lambda affinity: affinity.update(3), "ids is 3, expected several integers"),
        (lambda affinity: affinity.update([1, None]), "one of ids is None, expected an integer"),
        (lambda affinity: affinity.least_affinity(["x"]), "one of candidates is 'x', expected an integer"),
        (lambda affinity: affinity.score("x"), "expert is 'x', expected an integer"),
        (lambda affinity: affinity.activation_count(None), "expert is None, expected an integer"),
        (lambda affinity: affinity.frequency_percentile(1.5), "expert is 1.5, expected an integer"),
        (lambda affinity: affinity.top_k_by_affinity("x"), "k is 'x', expected an integer"),
        (lambda affinity: affinity.top_k_by_frequency(None), "k is None, expected an integer"),
    ],
)
def test_an_affinity_names_what_is_wrong_and_counts_nothing(use: Callable[[Any], object], message: str) -> None:
    affinity = ExpertAffinity(AffinityConfig(8))
    with pytest.raises(ValueError) as caught:
        use(affinity)
    assert str(caught.value) == message
    assert not affinity.activation_counts().any()


def test_a_layer_out_of_range_is_an_IndexError_that_names_the_range() -> None:
    affinity = ExpertAffinity(AffinityConfig(8), num_layers=2)
    for layer in (2, -1):
        for use in (affinity.scores, affinity.activation_counts, lambda layer: affinity.update([1], layer)):
            with pytest.raises(IndexError, match=f"layer is {layer}, expected 0 <= layer < 2"):
                use(layer)


def test_an_expert_id_that_is_no_number_is_named_and_changes_nothing() -> None:
    router: Any = MemoryAwareRouter(RouterConfig(8, 2))
    router.set_resident(3, resident=True)
    with pytest.raises(ValueError, match=r"^expert id is 'a', expected an integer$"):
        router.set_resident("a", resident=True)
    assert router.resident_experts() == [3]
