"""What each policy is worth keeping, and how policies are named."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from hotset.runtime.eviction import EvictionSettings, parse_eviction
from hotset.shm.demands import demand_of_set
from hotset.workers.eviction import _core
from hotset.workers.eviction.replay import make_policy


def policy_after(name: str, *sets: list[int], experts: int = 6, slots: float = 3) -> _core.Policy:
    policy = make_policy(parse_eviction(name), num_layers=1, num_experts=experts, num_streams=1, slots_per_layer=slots)
    for used in sets:
        policy.observe(demand_of_set(0, used))
    return policy


def values(policy: _core.Policy, experts: int = 6) -> npt.NDArray[np.float64]:
    out = np.empty((1, experts))
    policy.values(out)
    return out[0]


def test_the_base_policies() -> None:
    sets = [[0], [0], [1], [2]]
    assert values(policy_after("lru", *sets))[:4].tolist() == [2, 3, 4, 0]
    assert values(policy_after("lfu", *sets))[:4].tolist() == [2, 1, 1, 0]
    d, boost = 31 / 32, 1 / 32
    expected = [boost * (d**3 + d**2), boost * d, boost, 0]
    assert values(policy_after("affinity", *sets))[:4] == pytest.approx(expected)


def test_adaptive_counts_while_uses_differ_threefold_and_goes_by_recency_otherwise() -> None:
    even = [[0, 1], [2, 3], [4, 5]]
    assert np.argmin(values(policy_after("adaptive", *even, [2, 3, 4, 5], [0, 1]))) == 2  # oldest of equals
    uneven = [*even, [0], [0], [1]]  # 0 is used 3 times, 2 to 5 once, 1 was the latest
    order = np.argsort(values(policy_after("adaptive", *uneven)), kind="stable")
    assert order[-1] == 0
    assert np.argsort(values(policy_after("adaptive", *uneven[:-2])), kind="stable")[-1] == 0
    assert np.argmax(values(policy_after("adaptive", *even, [0], [1]))) == 1  # 2 to 1 is not threefold


def test_a_blend_lies_between_its_parts() -> None:
    sets = [[0], [0], [0], [1]]
    recency, affinity = values(policy_after("lru", *sets)) / 4, values(policy_after("affinity", *sets))
    for weight in (0.25, 0.5, 0.9):
        blended = values(policy_after(f"lru+affinity:{weight}", *sets))
        assert blended == pytest.approx((1 - weight) * recency + weight * affinity)


def test_what_is_admitted_stays_for_its_step_and_what_may_be_bypassed_does_not() -> None:
    assert policy_after("affinity@always", [0, 1], [4, 5]).kept() == [4, 5]
    assert policy_after("affinity@bypass", [0, 1], [4, 5]).kept() == []


def test_auto_admission_bypasses_when_steps_need_more_than_their_share_of_slots() -> None:
    roomy, crowded = policy_after("affinity", [0, 1], slots=4), policy_after("affinity", [0, 1], slots=3)
    assert (roomy.crowd, crowded.crowd) == (0.5, pytest.approx(2 / 3))
    assert roomy.kept() == [0, 1]
    assert crowded.kept() == []


def test_affinity_begins_where_an_earlier_run_ended() -> None:
    policy = policy_after("affinity", [0])
    policy.seed_affinity(np.array([[0.0, 0.5, 0.1, 0.0, 0.0, 0.0]]))
    assert np.argmax(values(policy)) == 1
    policy.observe(demand_of_set(0, [2]))
    assert values(policy)[1:3] == pytest.approx([0.5 * 31 / 32, 0.1 * 31 / 32 + 1 / 32])


def test_names() -> None:
    assert parse_eviction("td") == EvictionSettings("td")
    assert parse_eviction("lfu+affinity") == EvictionSettings("lfu", 0.5)
    assert parse_eviction("lru+affinity:0.3@always") == EvictionSettings("lru", 0.3, "always")
    assert parse_eviction("affinity@bypass") == EvictionSettings("affinity", 0, "bypass")


@pytest.mark.parametrize(
    "name",
    ["", "random", "LRU", "min", "lru+lfu", "td+affinity", "affinity+affinity:0.5", "lru+affinity:1.5", "lru@never",
     "lru+affinity:", "lru+affinity:..", "lru@"],
)  # fmt: skip
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="eviction is"):
        parse_eviction(name)


@pytest.mark.parametrize("name", ["td", "lru@always", "affinity", "lfu@bypass"])
def test_victims_come_in_the_order_in_which_sorting_all_of_them_puts_them(name: str) -> None:
    layers, experts, slots = 5, 16, 40
    chance = np.random.default_rng(3)
    policy = make_policy(
        parse_eviction(name), num_layers=layers, num_experts=experts, num_streams=1, slots_per_layer=slots / layers
    )
    worth, last_used = np.empty((layers, experts)), np.empty((layers, experts), np.uint64)
    protected_ones = 0
    for step in range(300):
        policy.observe(demand_of_set(step % layers, sorted(chance.choice(experts // 2, 3, replace=False).tolist())))
        in_slots = np.where(chance.random(slots) < 0.1, -1, chance.choice(layers * experts, slots, replace=False))
        among = chance.random(slots) < 0.7
        newcomer = None if step % 7 == 0 else int(chance.integers(layers * experts))
        policy.values(worth)
        policy.last_used(last_used)
        resident = in_slots[in_slots >= 0]
        in_layer = np.bincount(resident // experts, minlength=layers)
        if newcomer is not None:
            in_layer[newcomer // experts] += 1
        protected = np.isin(in_slots, policy.kept()) | (in_layer <= policy.floor)[in_slots // experts]
        keys = in_slots, last_used.ravel()[in_slots], worth.ravel()[in_slots], protected
        expected = [slot for slot in np.lexsort(keys).tolist() if among[slot] and in_slots[slot] >= 0]
        for most in (1, 8, slots):
            found, unprotected = policy.victims(in_slots, among, newcomer, most)
            assert found == expected[:most]
            assert unprotected == sum(not protected[slot] for slot in found)
        protected_ones += int(protected.sum())
    assert protected_ones


def test_victims_of_what_is_no_expert_are_refused() -> None:
    policy = policy_after("lru", [0])
    for experts, newcomer in (([6], None), ([0], 6), ([0], -1)):
        with pytest.raises(ValueError, match="there is no expert"):
            policy.victims(np.array(experts), None, newcomer, 1)
