"""Replay against a plain model of an event-atomic cache, and against what can be counted by hand."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from hotset.runtime.eviction import check_pool, parse_eviction
from hotset.shm.demands import NO_STREAM, Records, demand_of_set, demands_of_steps
from hotset.workers.eviction._core import Cache
from hotset.workers.eviction.replay import ReplayResult, make_policy, replay

# shijiuzhang/moe-cache-eval's conformance trace: 3 layers alike, 4 experts each, 5 steps.
TOY_STEPS = [(0, 1), (0, 2), (0, 1), (0, 3), (0, 1)]
DECAY = 31 / 32


def records_of(steps: list[list[tuple[int, ...]]]) -> Records:
    """steps[step][layer] is a set of experts."""
    return np.concatenate([demand_of_set(layer, experts) for step in steps for layer, experts in enumerate(step)])


def random_steps(seed: int, steps: int, layers: int, experts: int, largest: int) -> list[list[tuple[int, ...]]]:
    """Sets of 1 to `largest` experts, some experts far likelier than others."""
    random = np.random.default_rng(seed)
    likelihood = random.dirichlet(np.full(experts, 0.5), layers) + 1e-3
    likelihood /= likelihood.sum(1, keepdims=True)
    return [
        [
            tuple(random.choice(experts, random.integers(1, largest + 1), replace=False, p=likelihood[layer]).tolist())
            for layer in range(layers)
        ]
        for _ in range(steps)
    ]


def plain_replay(steps: list[list[tuple[int, ...]]], policy: str, slots: int, *, bypass: bool) -> tuple[int, int]:
    """One layer after the other, sets and dictionaries."""
    hits = misses = 0
    for layer in range(len(steps[0])):
        sets = [set(step[layer]) for step in steps]
        resident: set[int] = set()
        last: dict[int, int] = {}
        uses: dict[int, int] = {}
        score: dict[int, float] = {}
        for now, used in enumerate(sets):
            hits += len(used & resident)
            misses += len(used - resident)
            for expert in used:
                last[expert] = now
                uses[expert] = uses.get(expert, 0) + 1
            for expert in score.keys() | used:
                score[expert] = score.get(expert, 0.0) * DECAY + (expert in used) * (1 - DECAY)
            resident |= used
            while len(resident) > slots:
                kept = set[int]() if bypass else used
                candidates = (resident - kept) or resident

                worth: dict[int, float]
                if candidates == resident and not bypass:
                    worth = dict.fromkeys(resident, 0)  # only the kept are left: the order of use decides
                elif policy == "min":
                    worth = {
                        e: -next((t for t in range(now + 1, len(sets)) if e in sets[t]), len(sets)) for e in resident
                    }
                else:
                    worth = {"lru": last, "lfu": uses, "affinity": score}[policy]
                resident.remove(min((worth[expert], last[expert], expert) for expert in candidates)[2])
    return hits, misses


def run(
    steps: list[list[tuple[int, ...]]], policy: str, slots: int, experts: int, shared: bool = False
) -> ReplayResult:
    return replay(records_of(steps), policy, num_layers=len(steps[0]), num_experts=experts, slots=slots, shared=shared)


def counts(result: ReplayResult) -> tuple[int, int]:
    return result.hits, result.misses


def test_the_toy_trace_gives_12_hits_and_18_misses() -> None:
    assert counts(run([[step] * 3 for step in TOY_STEPS], "lru", 2, 4)) == (12, 18)


@pytest.mark.parametrize(
    ("policy", "admission"), list(itertools.product(["lru", "lfu", "affinity"], ["always", "bypass"]))
)
@pytest.mark.parametrize("slots", [2, 5, 9])
def test_policies_agree_with_a_plain_model(policy: str, admission: str, slots: int) -> None:
    steps = random_steps(slots, steps=300, layers=2, experts=12, largest=6)
    expected = plain_replay(steps, policy, slots, bypass=admission == "bypass")
    assert counts(run(steps, f"{policy}@{admission}", slots, 12)) == expected


@pytest.mark.parametrize("slots", [2, 5, 9])
def test_min_agrees_with_a_plain_model_that_looks_ahead(slots: int) -> None:
    steps = random_steps(slots, steps=200, layers=2, experts=12, largest=5)
    assert counts(run(steps, "min", slots, 12)) == plain_replay(steps, "min", slots, bypass=True)


def test_no_policy_beats_min() -> None:
    steps = random_steps(7, steps=400, layers=3, experts=16, largest=4)
    ceiling = run(steps, "min", 5, 16).hits
    for policy in ("lru", "lfu", "adaptive", "affinity@always", "affinity@bypass", "lfu+affinity:0.3", "td"):
        assert run(steps, policy, 5, 16).hits <= ceiling


def best_possible(sets: list[tuple[int, ...]], slots: int, resident: frozenset[int] = frozenset()) -> int:
    if not sets:
        return 0
    have = resident | set(sets[0])
    choices = itertools.combinations(sorted(have), min(slots, len(have)))
    return len(resident & set(sets[0])) + max(best_possible(sets[1:], slots, frozenset(c)) for c in choices)


def test_min_is_the_best_that_any_choice_of_victims_reaches() -> None:
    for seed in range(20):
        steps = random_steps(seed, steps=6, layers=1, experts=5, largest=2)
        assert run(steps, "min", 2, 5).hits == best_possible([step[0] for step in steps], 2)


def test_a_step_is_looked_up_against_one_snapshot() -> None:
    # Looked up one by one in one slot, expert 1 would drive out 0 and 0 would drive out 1: no hits at all.
    steps: list[list[tuple[int, ...]]] = [[(0, 1)]] * 10
    assert counts(run(steps, "lru", 1, 4)) == (9, 11)


def test_an_expert_that_several_tokens_want_counts_once() -> None:
    ids = np.array([[[[0, 1]], [[0, 2]]]], np.uint16)  # one step of two tokens, one layer
    assert counts(replay(demands_of_steps(ids), "lru", num_layers=1, num_experts=4, slots=4)) == (0, 3)


def test_a_shared_pool_gives_slots_to_the_layer_that_needs_them() -> None:
    # Layer 0 uses the same expert all the time, layer 1 three in turn.
    steps: list[list[tuple[int, ...]]] = [[(0,), (step % 3,)] for step in range(60)]
    assert run(steps, "lru", 2, 4).misses == 1 + 60
    assert run(steps, "lru", 4, 4, shared=True).misses == 1 + 3


def test_a_layer_keeps_its_share_where_values_cannot_be_compared_between_layers() -> None:
    # Layer 0 uses two experts over and over, layer 1 four in turn: by the number of uses, layer 1 would get one slot.
    steps: list[list[tuple[int, ...]]] = [[(step % 2,), (step // 8 % 4,)] for step in range(512)]
    shared, apart = run(steps, "lfu@always", 4, 8, shared=True), run(steps, "lfu@always", 2, 8)
    assert shared.hits >= apart.hits


def test_a_layer_keeps_a_quarter_of_its_share_of_a_shared_pool() -> None:
    # Layer 0 uses eight experts in turn, layer 1 one in every eighth step: the least recently used of all, each time.
    steps = [[demand_of_set(0, [step % 8])] + [demand_of_set(1, [0])] * (step % 8 == 0) for step in range(128)]
    records = np.concatenate([record for step in steps for record in step])
    hits = replay(records, "lru", num_layers=2, num_experts=8, slots=8, shared=True).hits
    assert hits == 15  # of layer 1, which keeps one of its four slots


def test_lru_in_a_shared_pool_smaller_than_a_token_hits_nothing_and_is_refused() -> None:
    steps: list[list[tuple[int, ...]]] = [[(0, 1)] * 4] * 20
    assert run(steps, "lru", 4, 4, shared=True).hits == 0  # 4 slots, 8 experts per token
    with pytest.raises(ValueError, match=r"eviction is 'lru' with 4 expert slots, expected at least 8"):
        check_pool("lru", slots=4, cycle=8)
    check_pool("lru", slots=8, cycle=8)
    check_pool("affinity", slots=4, cycle=8)


def good_record() -> npt.NDArray[np.uint16]:
    return demand_of_set(0, [1, 2])


@pytest.mark.parametrize(
    ("records", "problem"),
    [
        (good_record()[:5], "ends within a record's header, at word 0"),
        (good_record()[:-1], "ends within a record, at word 0"),
        (demand_of_set(3, [1]), "names a layer that is not there"),
        (np.concatenate([good_record(), demand_of_set(0, [9])]), "names an expert that is not there, at word 11"),
        (np.zeros(16, np.uint16), "has a record of wrong length"),
    ],
)
def test_damaged_records_are_refused(records: Records, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        replay(records, "lru", num_layers=1, num_experts=4, slots=2)


def test_a_prefill_moves_the_cache_but_is_not_counted() -> None:
    records = np.concatenate([demand_of_set(0, [1, 2], NO_STREAM), demand_of_set(0, [2, 3])])
    assert replay(records, "lru", num_layers=1, num_experts=4, slots=2) == ReplayResult(1, hits=1, misses=1)


def test_a_cache_used_step_by_step_hits_what_a_replay_hits_and_says_what_is_resident() -> None:
    steps = random_steps(11, steps=200, layers=2, experts=70, largest=5)
    for policy, shared, slots in (("lru@always", False, 9), ("affinity", False, 9), ("td", True, 18)):
        whole = run(steps, policy, slots, 70, shared=shared)
        cache = Cache(
            make_policy(parse_eviction(policy), num_layers=2, num_experts=70, num_streams=1, slots_per_layer=9),
            slots,
            shared,
        )
        mask = np.zeros((2, 2), np.uint64)
        hits = 0
        for step in steps:
            for layer, experts in enumerate(step):
                before = {e for e in range(70) if int(mask[layer, e // 64]) >> e % 64 & 1}
                found, missed = cache.step(demand_of_set(layer, experts), np.array([experts], np.int32), mask)
                assert (found, missed) == (len(before & set(experts)), len(set(experts) - before))
                hits += found
        assert hits == whole.hits
        assert sum(int(word).bit_count() for word in mask.ravel()) == 18


def test_a_policy_learns_what_the_gate_chose_while_the_cache_holds_what_was_used() -> None:
    steps = random_steps(12, steps=300, layers=1, experts=20, largest=4)
    random = np.random.default_rng(13)
    options = {"num_layers": 1, "num_experts": 20, "num_streams": 1, "slots_per_layer": 5}
    policy, taught = (make_policy(parse_eviction("td"), **options) for _ in range(2))
    cache, mask = Cache(policy, 5), np.zeros((1, 1), np.uint64)
    for (wanted,) in steps:
        used = random.choice(20, (2, 3)).astype(np.int32)  # of two rows, and some more than once
        before = {e for e in range(20) if int(mask[0, 0]) >> e & 1}
        distinct = set(used.ravel().tolist())
        assert cache.step(demand_of_set(0, wanted), used, mask) == (len(distinct & before), len(distinct - before))
        after = {e for e in range(20) if int(mask[0, 0]) >> e & 1}
        assert after <= before | distinct  # what is wanted and not used is not loaded
        taught.observe(demand_of_set(0, wanted))
    values, expected = np.zeros((1, 20)), np.zeros((1, 20))
    policy.values(values)
    taught.values(expected)
    assert np.array_equal(values, expected)


@pytest.mark.parametrize(
    ("records", "used", "problem"),
    [
        (np.tile(demand_of_set(0, [1]), 2), [[1]], "expected one record"),
        (np.zeros(0, np.uint16), [[1]], "expected one record"),
        (demand_of_set(0, [1]), [[4]], "an expert id is 4, expected 0 <= id < 4"),
        (demand_of_set(0, [1]), [[-1]], "an expert id is -1"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(records: Records, used: list[list[int]], problem: str) -> None:
    policy = make_policy(parse_eviction("lru"), num_layers=1, num_experts=4, num_streams=1, slots_per_layer=2)
    with pytest.raises(ValueError, match=problem):
        Cache(policy, 2).step(records, np.array(used, np.int32), np.zeros((1, 1), np.uint64))
