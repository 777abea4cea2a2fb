"""The learned eviction against plain numpy, and what it must be able to learn."""

from __future__ import annotations

import ctypes
import ctypes.util
import platform

import numpy as np
import numpy.typing as npt
import pytest
from demand_patterns import Ids, drifting, follows, random_ids, switching, uniform

from hotset.runtime.eviction import eviction_nbytes, parse_eviction
from hotset.shm.demands import Records, demand_of_set, demands_of_steps
from hotset.workers.eviction import _core
from hotset.workers.eviction.replay import make_policy, replay

RATES = np.array([1 / 4, 1 / 16, 1 / 64, 1 / 256], np.float32)
SETS = 6
UNIT = 1 / 4096
COARSE_UNIT = 1 / 1536
GOLDEN = 0x9E3779B9


class PlainTd:
    """workers/eviction/core/td.h for one model, as formulas, in float32 like there: whole units round alike."""

    def __init__(self, layers: int, experts: int, streams: int, unit: float = UNIT) -> None:
        self.coarse = experts > 64
        self.set_weights = np.zeros((layers, SETS, experts, experts), np.int64)  # in units
        self.turn = [0] * layers
        self.remainder = np.zeros((layers, experts), np.float32)
        self.trait_weights = np.zeros((layers, 6, experts), np.float32)
        self.averages = np.zeros((streams, layers, 4, experts), np.float32)
        self.features: dict[tuple[int, int], tuple[list[tuple[int, int]], npt.NDArray[np.float32]]] = {}
        self.estimates = np.zeros((streams, layers, experts), np.float32)
        self.latest: dict[tuple[int, int], list[int]] = {}
        self.layers, self.experts, self.unit = layers, experts, np.float32(COARSE_UNIT if self.coarse else unit)

    def observe(self, stream: int, layer: int, used: list[int], batch: int) -> None:
        neighbours = [(layer - 1) % self.layers, (layer - 2) % self.layers, (layer - 3) % self.layers]
        of_own, of_others = (4, 3) if self.experts > 64 else (self.experts, self.experts)
        sets = [used, self.latest.get((stream, layer), [])[:of_own]]
        sets += [self.latest.get((stream, near), [])[:of_others] for near in (*neighbours, (layer + 1) % self.layers)]
        rows = [(number, expert) for number, members in enumerate(sets) for expert in members]
        now = np.isin(np.arange(self.experts), used).astype(np.float32)
        averages = self.averages[stream, layer] * (1 - RATES[:, None]) + RATES[:, None] * now
        self.averages[stream, layer] = averages
        traits = np.vstack([np.ones_like(now), now, averages])
        y = np.zeros_like(now)
        for weights, trait in zip(self.trait_weights[layer], traits, strict=True):
            y += weights * trait
        y += self.unit * sum(self.set_weights[layer, number, expert] for number, expert in rows).astype(np.float32)
        if (stream, layer) in self.features:
            old_rows, old_traits = self.features[stream, layer]
            gamma = np.float32(2 / 3 if batch >= 4 else 7 / 8 - (7 / 8 - 2 / 3) * (batch - 1) / 3)
            eta = np.float32(min(0.005, 0.5 / (batch * (len(old_rows) + 3))))
            target = np.where(now > 0, np.float32(1), gamma * y.clip(0, 1))
            change = eta * (target - self.estimates[stream, layer])
            if self.coarse:  # in 256ths
                dither = np.float32(self.turn[layer] % 2**16 / 2**16 - 0.5)
                whole = np.rint(change * np.float32(256 / COARSE_UNIT) + dither)
            else:
                exact = change * np.float32(1 / self.unit) + self.remainder[layer]
                whole = np.rint(exact)
                self.remainder[layer] = exact - whole
            self.move(layer, old_rows, whole.astype(np.int64))
            self.trait_weights[layer] += change * old_traits
        self.features[stream, layer] = (rows, traits)
        self.estimates[stream, layer] = y
        self.latest[stream, layer] = used

    def move(self, layer: int, rows: list[tuple[int, int]], change: npt.NDArray[np.int64]) -> None:
        self.turn[layer] = (self.turn[layer] + GOLDEN) % 2**32
        for place, row in enumerate(rows):
            weights = self.set_weights[layer, *row]
            if self.coarse:
                threshold = (self.turn[layer] + place * ((2**32 - 1) // len(rows))) % 2**32 >> 24
                weights[:] = (weights + change // 256 + (change % 256 > threshold)).clip(-128, 127)
            else:
                weights += change

    def value(self, layer: int) -> npt.NDArray[np.float64]:
        return 1 - np.prod(1 - np.minimum(self.estimates[:, layer], 1), axis=0)


def td_policy(layers: int, experts: int, streams: int, slots: float = 4) -> _core.Policy:
    return make_policy(
        parse_eviction("td"), num_layers=layers, num_experts=experts, num_streams=streams, slots_per_layer=slots
    )


def records_of(ids: Ids) -> Records:
    return demands_of_steps(ids)


@pytest.mark.parametrize(
    ("layers", "experts", "streams", "top_k"),
    [
        (1, 8, 1, 2),
        (2, 13, 1, 3),
        (5, 32, 1, 4),
        (4, 32, 2, 4),
        (3, 64, 5, 6),
        (2, 70, 1, 4),
        (6, 128, 1, 8),
        (2, 16, 6, 16),
        (2, 256, 2, 8),
        (1, 328, 2, 6),
    ],
)
def test_estimates_agree_with_numpy(layers: int, experts: int, streams: int, top_k: int) -> None:
    ids = random_ids(1, 60, streams, layers, experts, top_k)
    policy, plain = td_policy(layers, experts, streams), PlainTd(layers, experts, streams)
    policy.observe(records_of(ids))
    for step in ids:
        for layer in range(layers):
            for stream in range(streams):
                plain.observe(stream, layer, step[stream, layer].tolist(), streams)
    estimates = np.empty(experts, np.float32)
    for stream in range(streams):
        for layer in range(layers):
            policy.estimates(stream, layer, estimates)
            np.testing.assert_allclose(estimates, plain.estimates[stream, layer], atol=1e-5)
    assert np.abs(plain.estimates).max() > 0.05  # there was something to agree about


def test_weights_of_8_bits_stay_within_them() -> None:
    ids = np.full((3000, 1, 1, 1), 7)
    policy, plain = td_policy(1, 70, 1), PlainTd(1, 70, 1)
    policy.observe(records_of(ids))
    for _ in ids:
        plain.observe(0, 0, [7], 1)
    assert plain.set_weights.max() == 127
    estimates = np.empty(70, np.float32)
    policy.estimates(0, 0, estimates)
    np.testing.assert_allclose(estimates, plain.estimates[0, 0], atol=1e-5)
    assert estimates.argmax() == 7 and 0.9 < estimates[7] < 1.1


def test_moves_of_less_than_a_unit_of_8_bits_are_not_lost() -> None:
    """A thousand streams of a step: eta is so small that no move is as long as a quarter of a unit."""
    ids = random_ids(3, 40, 1000, 1, 70, 4)
    ids[..., 0] = 0
    policy = td_policy(1, 70, 1000)
    policy.observe(records_of(ids))
    sets, traits = policy.learned_shapes
    weights = np.empty(sets, np.uint8)
    policy.learned(weights, np.empty(traits, np.float32))
    of_own_set = weights.view(np.int8)[0, 0].astype(float)
    assert of_own_set[:, 0].mean() > of_own_set[:, 1:70].mean() + 1


def test_whole_units_learn_what_real_numbers_would() -> None:
    ids = follows(3, 6000, 12)
    policy = td_policy(2, 12, 1)
    policy.observe(records_of(ids))
    plain, estimates = PlainTd(2, 12, 1, unit=2**-30), np.empty(12, np.float32)
    for step in ids:
        for layer in range(2):
            plain.observe(0, layer, step[0, layer].tolist(), 1)
    for layer in range(2):
        policy.estimates(0, layer, estimates)
        np.testing.assert_allclose(estimates, plain.estimates[0, layer], atol=24 * UNIT)


def test_a_layer_that_diverged_begins_anew() -> None:
    policy = td_policy(1, 12, 2)
    policy.observe(records_of(random_ids(2, 50, 2, 1, 12, 3)))
    assert not policy.divergences
    # As if every step had one token, while 900 learn from each other: the step is too long for that.
    crowd = td_policy(1, 12, 900)
    ids = random_ids(2, 40, 900, 1, 12, 3)
    for step in ids:
        for stream in range(900):
            crowd.observe(demand_of_set(0, step[stream, 0].tolist(), stream))
    assert crowd.divergences


def test_a_batch_wants_an_expert_when_one_of_its_streams_does() -> None:
    ids = np.concatenate([follows(seed, 4000, 12) for seed in range(3)], axis=1)
    ids[:, 0] = 11  # the first stream always uses expert 11
    policy, plain = td_policy(2, 12, 3), PlainTd(2, 12, 3)
    policy.observe(records_of(ids))
    for step in ids:
        for layer in range(2):
            for stream in range(3):
                plain.observe(stream, layer, step[stream, layer].tolist(), 3)
    assert policy.td_leads
    values = np.empty((2, 12))
    policy.values(values)
    # Layer 0, whose next step comes first, needs what it needs sooner than its estimate of a step ago says.
    np.testing.assert_allclose(
        values, [(7 / 8 - 2 * (7 / 8 - 2 / 3) / 3) ** -0.5 * plain.value(0), plain.value(1)], atol=1e-4
    )
    assert values.argmax(1).tolist() == [11, 11]


def test_a_stream_that_ended_wants_nothing_any_more() -> None:
    ids = np.concatenate([follows(seed, 4000, 12) for seed in range(2)], axis=1)
    ids[:, 1] = 11
    policy = td_policy(2, 12, 2)
    policy.observe(records_of(ids))
    values, alone = np.empty((2, 12)), np.empty(12, np.float32)
    policy.values(values)
    assert policy.td_leads and values[:, 11].min() > 0.5
    policy.observe(records_of(ids[:20, :1]))  # the first stream goes on alone
    policy.values(values)
    policy.estimates(0, 1, alone)
    np.testing.assert_allclose(values[1], alone, atol=1e-5)


def test_it_learns_what_follows_what() -> None:
    ids = follows(4, 20_000, 24)
    hit_rate = {
        policy: replay(records_of(ids), policy, num_layers=2, num_experts=24, slots=6).hit_rate
        for policy in ("lru", "lfu", "affinity", "td", "min")
    }
    best_other = max(hit_rate["lru"], hit_rate["lfu"], hit_rate["affinity"])
    assert hit_rate["td"] > best_other + 0.25 * (hit_rate["min"] - best_other)


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_can_be_learned_the_guard_keeps_it_at_affinity(seed: int) -> None:
    """Popularity that jumps every 300 steps: estimates are always late."""
    random = np.random.default_rng(seed)
    ids = np.concatenate([
        random.choice(64, 8, replace=False)[random_ids(seed + phase, 300, 1, 4, 8, 4)] for phase in range(40)
    ])  # fmt: skip
    result = {
        policy: replay(records_of(ids), policy, num_layers=4, num_experts=64, slots=10).hit_rate
        for policy in ("affinity", "td")
    }
    assert result["td"] > result["affinity"] - 0.01


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "ids",
    [
        drifting(1, 4000, 4, 32, 4, speed=0.02),
        drifting(2, 4000, 4, 32, 4, speed=0.3),
        switching(3, 4000, 4, 32, 4, every=50),
        switching(4, 4000, 4, 32, 4, every=1000),
        uniform(5, 4000, 4, 32, 4),
    ],
    ids=["slow drift", "fast drift", "topics of 50", "topics of 1000", "uniform"],
)
def test_it_is_never_much_worse_than_affinity(ids: Ids, shared: bool) -> None:
    for slots in (4, 8, 16):
        affinity, learned = (
            replay(
                records_of(ids),
                policy,
                num_layers=4,
                num_experts=32,
                slots=4 * slots if shared else slots,
                shared=shared,
            ).hit_rate
            for policy in ("affinity", "td")
        )
        assert learned > affinity - 0.005


@pytest.mark.parametrize(("layers", "experts", "streams"), [(24, 32, 16), (48, 128, 4)])
def test_the_plan_counts_the_memory_of_the_weights(layers: int, experts: int, streams: int) -> None:
    sets, traits = td_policy(layers, experts, streams).learned_shapes
    nbytes = int(np.prod(sets)) + 4 * int(np.prod(traits))
    planned = eviction_nbytes("td", num_layers=layers, num_experts=experts, num_streams=streams)
    assert nbytes < planned < 4 * nbytes + streams * 2**20
    assert eviction_nbytes("lru", num_layers=layers, num_experts=experts, num_streams=streams) == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags' bits are those of x86-64")
@pytest.mark.parametrize("policy", ["affinity", "td"])
def test_what_is_not_used_for_long_leaves_no_numbers_that_the_processor_is_slow_with(policy: str) -> None:
    """Subnormal numbers, to which averages of use decay: one operation on them takes as long as a hundred others."""
    subnormal_operand, underflow = 2, 16
    flags = ctypes.CDLL(ctypes.util.find_library("m"))
    core = make_policy(parse_eviction(policy), num_layers=1, num_experts=64, num_streams=1, slots_per_layer=8)
    core.observe(records_of(random_ids(1, 100, 1, 1, 64, 4)))
    flags.feclearexcept(subnormal_operand | underflow)
    core.observe(records_of(random_ids(2, 25_000, 1, 1, 8, 4)))  # and of all others none
    assert flags.fetestexcept(subnormal_operand | underflow) == 0


def test_affinity_decides_until_learning_pays() -> None:
    policy = td_policy(2, 24, 1, slots=6)
    assert not policy.td_leads
    policy.observe(records_of(follows(4, 20_000, 24)))
    assert policy.td_leads


def test_forgotten_streams_do_not_teach_what_never_happened() -> None:
    ids = random_ids(5, 50, 1, 2, 12, 3)
    policy, plain = td_policy(2, 12, 1), PlainTd(2, 12, 1)
    policy.observe(records_of(ids[:25]))
    policy.forget_streams()
    policy.observe(records_of(ids[25:]))
    for number, step in enumerate(ids):
        if number == 25:
            plain.features.clear()
            plain.latest.clear()
        for layer in range(2):
            plain.observe(0, layer, step[0, layer].tolist(), 1)
    estimates = np.empty(12, np.float32)
    policy.estimates(0, 1, estimates)
    np.testing.assert_allclose(estimates, plain.estimates[0, 1], atol=1e-5)
