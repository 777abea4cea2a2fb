"""What td eviction has learned outlives the process that learned it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from demand_patterns import follows
from instances import wait_until
from model_factory import make_model
from pager_alone import PagerAlone
from safetensors.numpy import load_file, save_file

from hotset.runtime.eviction import parse_eviction
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.messages.pager import WarmStartProblem
from hotset.shm.counters import Counter
from hotset.shm.demands import demands_of_steps
from hotset.workers.eviction import _core
from hotset.workers.eviction.learned import Learned, LearnedKeeper, UnusableLearned
from hotset.workers.eviction.replay import make_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder, num_layers=2, num_experts=24, experts_per_token=1)


def policy_of(name: str = "td", experts: int = 24) -> _core.Policy:
    return make_policy(parse_eviction(name), num_layers=2, num_experts=experts, num_streams=1, slots_per_layer=6)


def hits(policy: _core.Policy, seed: int, steps: int) -> int:
    return policy.replay(demands_of_steps(follows(seed, 40_000, 24)[-steps:]), 6)[1]


def test_a_policy_that_begins_with_what_was_learned_hits_more_from_the_first_step_on() -> None:
    taught, untaught, teacher = policy_of(), policy_of(), policy_of()
    teacher.observe(demands_of_steps(follows(4, 20_000, 24)))
    Learned.of(teacher).teach(taught)
    assert taught.td_leads and not untaught.td_leads
    assert hits(taught, 4, 1000) > 1.2 * hits(untaught, 4, 1000)


def test_the_file_holds_what_was_learned(folder: Path) -> None:
    teacher, pupil = policy_of(), policy_of()
    teacher.observe(demands_of_steps(follows(4, 2000, 24)))
    keeper = LearnedKeeper(folder, teacher, enabled=True)
    keeper.save(wait=True)
    assert not LearnedKeeper(folder, pupil, enabled=True).refused
    expected, found = Learned.of(teacher), Learned.of(pupil)
    np.testing.assert_array_equal(found.sets, expected.sets)
    np.testing.assert_array_equal(found.traits, expected.traits)
    assert expected.sets.any() and expected.traits.any()


def test_nothing_is_written_of_a_policy_that_does_not_learn_or_when_it_is_switched_off(folder: Path) -> None:
    Learned.path(folder).unlink(missing_ok=True)
    for name, enabled in (("affinity", True), ("td", False)):
        policy = policy_of(name)
        keeper = LearnedKeeper(folder, policy, enabled=enabled)
        policy.observe(demands_of_steps(follows(4, 10, 24)))
        keeper.save(wait=True)
    assert not Learned.path(folder).exists()


def test_damaged_files_and_those_of_other_shapes_are_refused(folder: Path) -> None:
    path, policy = Learned.path(folder), policy_of()
    Learned.of(policy_of(experts=12)).save(folder)
    with pytest.raises(UnusableLearned, match=r"weights are uint8 \[2, 6, 12, 64\], expected uint8 \[2, 6, 24, 64\]"):
        Learned.load(folder, policy)
    Learned.of(policy).save(folder)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnusableLearned, match="td eviction learned is not used"):
        Learned.load(folder, policy)
    path.write_bytes(whole)
    arrays = load_file(path)
    arrays["traits"][1, 2, 3] = np.nan
    save_file(arrays, path, {"features": "3"})
    with pytest.raises(UnusableLearned, match="not all weights are numbers"):
        Learned.load(folder, policy)
    save_file(arrays, path, {"features": "2"})
    with pytest.raises(UnusableLearned, match="its features are 2, expected 3"):
        Learned.load(folder, policy)


def use(pager: PagerAlone, steps: int) -> None:
    for step in follows(4, steps, 24)[:, 0]:
        for layer in range(2):
            pager.access.note_demand(layer, step[layer][np.newaxis].astype(np.int32), np.zeros(1, np.int32))
            for _ in pager.access.resident(layer, step[layer].tolist()):
                pass


def test_the_pager_keeps_it_and_says_what_it_cannot_use(folder: Path) -> None:
    Learned.path(folder).unlink(missing_ok=True)
    pager = PagerAlone(folder, eviction="td")
    try:
        use(pager, 50)
    finally:
        pager.child.channel.send(StopWorking())
        assert wait_until(Learned.path(folder).exists)
        pager.close()
    learned = Learned.load(folder, policy_of())
    assert learned is not None and learned.sets.any()
    Learned.path(folder).write_bytes(b"nonsense")
    pager = PagerAlone(folder, eviction="td")
    try:
        assert pager.count(Counter.LEARNED_REFUSED) == 1
        assert wait_until(
            lambda: any(isinstance(message, WarmStartProblem) for message in pager.child.channel.receive())
        )
    finally:
        pager.close()
