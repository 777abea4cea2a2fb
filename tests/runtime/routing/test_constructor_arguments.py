"""What a router or an affinity is made from is named when it is wrong, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    ],
)
def test_a_wrong_argument_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_an_expert_id_that_is_no_number_is_named_and_changes_nothing() -> None:
    router: Any = MemoryAwareRouter(RouterConfig(8, 2))
    router.set_resident(3, resident=True)
    with pytest.raises(ValueError, match=r"^expert id is 'a', expected an integer$"):
        router.set_resident("a", resident=True)
    assert router.resident_experts() == [3]
