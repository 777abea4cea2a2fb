"""Simulated instances: exact where nothing is preferred, the same alone as among others, and honestly counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from family_models import make_family_model

from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.runtime.router_config import Policy
from hotset.workers import simulation as simulation_module
from hotset.workers.simulated_instance import Setting
from hotset.workers.simulation import Outcome, Simulation, losses_and_divergences, windows_of

SOURCE = Path(__file__).read_text()
LAYERS, TOP_K = 4, 4


@pytest.fixture(scope="module")
def texts() -> npt.NDArray[np.int32]:
    """4 texts of 2 windows of 24 tokens."""
    return windows_of(Tokenizer(TRAINED_MODEL).encode(SOURCE), texts=4, windows=2, length=24)


def run(texts: npt.NDArray[np.int32], *settings: Setting) -> tuple[Simulation, list[Outcome]]:
    simulation = Simulation(TRAINED_MODEL, texts, settings)
    return simulation, simulation.run()


def same(one: Outcome, other: Outcome) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Outcome.__struct_fields__)


def test_no_preference_is_exact_routing_to_the_last_bit(texts: npt.NDArray[np.int32]) -> None:
    settings = [Setting(policy, 0.0, "affinity", 8) for policy in ("bonus", "resnorm", "mass", "range")]
    simulation, (exact, *outcomes) = run(texts, *settings)
    hits, misses = simulation.exact_hits(settings[0])
    for outcome in outcomes:
        assert np.array_equal(outcome.loss, exact.loss) and not outcome.divergence.any()
        assert np.array_equal(outcome.hits, hits) and np.array_equal(outcome.misses, misses)
    assert hits.sum() + misses.sum() == 4 * 2 * 24 * LAYERS * TOP_K
    assert 0 < hits.sum() < misses.sum() * 3


def test_a_preference_costs_likelihood_and_saves_misses(texts: npt.NDArray[np.int32]) -> None:
    settings = [Setting("resnorm", strength, "affinity", 8) for strength in (0.0, 0.1, 1.0)]
    _, (_, *outcomes) = run(texts, *settings)
    divergences = [outcome.divergence.sum() for outcome in outcomes]
    misses = [outcome.misses.sum() for outcome in outcomes]
    assert divergences == sorted(divergences) and divergences[1] > 0
    assert misses == sorted(misses, reverse=True) and misses[2] < misses[0]


def test_what_stands_in_under_substitute_is_left_out(
    texts: npt.NDArray[np.int32], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[bool] = []
    combine = simulation_module.combine_in_rank_order

    def watch(outputs: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        left_out.append(bool((weights[len(texts) :] == 0).any()))
        assert (weights[: len(texts)] > 0).all()
        return combine(outputs, weights)

    monkeypatch.setattr(simulation_module, "combine_in_rank_order", watch)
    run(texts, Setting("substitute", 0.1, "td", 8))
    assert sum(left_out) > len(left_out) / 2


def test_a_setting_alone_does_what_it_does_among_others(texts: npt.NDArray[np.int32]) -> None:
    settings = [
        Setting("resnorm", 0.2, "td", 8),
        Setting("range", 0.1, "lru", 12, batch=2),
        Setting("bonus", 0.3, "affinity", 8, shared=True),
    ]
    _, (_, *together) = run(texts, *settings)
    for setting, outcome in zip(settings, together, strict=True):
        _, (_, alone) = run(texts, setting)
        assert same(outcome, alone)


def test_texts_that_share_an_instance_are_counted_once_for_both(texts: npt.NDArray[np.int32]) -> None:
    _, (_, outcome) = run(texts, Setting("resnorm", 0.1, "affinity", 8, batch=2))
    assert not outcome.hits[[1, 3]].any() and not outcome.misses[[1, 3]].any()
    distinct = outcome.hits.sum() + outcome.misses.sum()
    assert 2 * 2 * 24 * LAYERS * TOP_K < distinct < 4 * 2 * 24 * LAYERS * TOP_K
    with pytest.raises(ValueError, match="4 texts cannot be decoded 3 at a time"):
        Simulation(TRAINED_MODEL, texts, [Setting("resnorm", 0.1, "affinity", 8, batch=3)])


def test_windows_are_contexts_of_their_own(texts: npt.NDArray[np.int32]) -> None:
    _, (exact,) = run(texts)
    _, (second,) = run(np.ascontiguousarray(texts[:, 1:]))
    assert np.array_equal(exact.loss[:, 1:], second.loss)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("gpt_oss in mxfp4", "resnorm"),
        ("qwen3_moe with layers without experts", "resnorm"),
        ("qwen2_moe with windows in some layers", "resnorm"),
        ("deepseek_v3", "resnorm"),
        ("deepseek_v3", "substitute"),
    ],
)
def test_other_families(tmp_path: Path, family: str, policy: Policy) -> None:
    """What is not the shipped model's: layers without experts, windows, renormalised weights, other formats, and gates
    with a bias and a weight scale."""
    model = make_family_model(tmp_path, family)
    tokens = windows_of(np.random.default_rng(0).integers(1, 256, 300).astype(np.int32), texts=2, windows=2, length=40)
    settings = [Setting(policy, strength, "td", 3, shared=True) for strength in (0.0, 0.5)]
    simulation = Simulation(model, tokens, settings)
    exact, none, some = simulation.run()
    hits, misses = simulation.exact_hits(settings[0])
    config = simulation.config
    assert np.array_equal(none.loss, exact.loss) and some.divergence.sum() > 0
    assert np.array_equal(none.hits, hits) and np.array_equal(none.misses, misses)
    layers = config.num_layers - len(config.dense_layers)
    assert hits.sum() + misses.sum() == 2 * 2 * 40 * layers * config.experts_per_token
    assert some.misses.sum() < misses.sum()


def test_few_experts_in_memory_give_the_same_outcome(texts: npt.NDArray[np.int32]) -> None:
    setting = Setting("resnorm", 0.2, "affinity", 8)
    _, (_, expected) = run(texts, setting)
    few = Simulation(TRAINED_MODEL, texts, [setting], max_expert_nbytes=5 * 49_152)
    assert same(few.run()[1], expected)


def test_losses_and_divergences_are_those_of_plain_formulas() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(scale=5, size=(3, 2, 50)).astype(np.float32)
    targets = np.array([7, 49], np.int32)
    losses, divergences = losses_and_divergences(logits, targets)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(losses, -np.log(p[:, [0, 1], targets]), rtol=1e-5)
    np.testing.assert_allclose(divergences, (p[0] * np.log(p[0] / p)).sum(axis=2), rtol=1e-4, atol=1e-6)
    assert not divergences[0].any()


def test_windows_follow_one_another_and_texts_are_spread() -> None:
    texts = windows_of(np.arange(101, dtype=np.int32), texts=2, windows=3, length=10)
    assert texts[0, :, 0].tolist() == [0, 10, 20] and texts[1, 0, 0] == 70
    assert texts[0, 0].tolist() == list(range(11)) and texts[1, 2, -1] == 100
    with pytest.raises(ValueError, match="the text has 60 tokens, expected at least 61"):
        windows_of(np.arange(60, dtype=np.int32), texts=2, windows=3, length=10)
