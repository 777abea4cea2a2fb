"""An instance and an expert cache take experts that a user names the same way, and refuse the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hotset.runtime import Backend, ExpertCache

METHODS = ("pin_experts", "unpin_experts", "page_out")


@pytest.fixture(scope="module", params=[Backend, ExpertCache])
def holder(request: pytest.FixtureRequest) -> Iterator[Backend | ExpertCache]:
    settings = {"workers": 1} if request.param is Backend else {}
    with request.param(expert_budget="25%", user_pins=3, warm_start=False, **settings) as running:
        yield running


@pytest.mark.parametrize(
    "experts",
    [
        [5, 3, 5],
        (3, 5),
        {3, 5},
        range(3, 7, 2),
        {3: "a", 5: "b"}.keys(),
        np.array([3, 5], np.uint8),
        np.array([[3, 5], [5, 3]]),  # of two tokens, as a router gives them
        [[3, 5], [5, 3]],
        [np.int64(3), 5],
        [np.uint64(3), 5],
    ],
    ids=str,
)
def test_experts_are_integers_or_a_routers_rows(holder: Backend | ExpertCache, experts: Any) -> None:
    holder.pin_experts(np.int64(1), experts)
    assert holder.stats().pinned_experts == [(1, 3), (1, 5)]
    assert sorted(holder.page_out(1, np.array([[3, 4], [5, 3]]))) == [3, 5]  # each once
    holder.unpin_experts(1, np.array([[3], [5]]))
    assert holder.stats().pinned_experts == []


def test_of_no_experts_nothing_is_done(holder: Backend | ExpertCache) -> None:
    holder.pin_experts(0, [])
    holder.unpin_experts(0, ())
    assert holder.page_out(0, []) == [] and holder.stats().pinned_experts == []


@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_expert_is_refused_in_a_sentence(holder: Backend | ExpertCache, method: str) -> None:
    ask = getattr(holder, method)
    for layer in ("x", None, 1.5, math.nan, True, -1, 4, 10**9):
        with pytest.raises(ValueError, match=r"layer is .*, expected"):
            ask(layer, [0])
    for experts in (None, 5, "x", {1: 2}, b"\x01", [1.5], ["a"], [None], [math.nan], [True], [[1], [2, 3]], [[[1]]]):
        with pytest.raises(ValueError, match=r"experts is .*, expected integers, or rows of as many"):
            ask(0, experts)
    for expert in (-1, 32, 10**9, 2**63, 10**30):
        for experts in ([expert], [[0, expert]]):
            with pytest.raises(ValueError, match=f"expert id is {expert}, expected 0 <= id < 32"):
                ask(0, experts)
