"""Choosing tokens: what each option does, that draws repeat, and that they follow the distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hotset.runtime.sampling_params import SamplingParams
from hotset.workers.compute.sampler import sample, uniform

NONE = np.empty(0, np.int32)


def draw(
    logits: Any, position: int = 0, seed: int = 1, prompt: Any = NONE, generated: Any = NONE, **options: Any
) -> int:
    return sample(
        np.asarray(logits, np.float32),
        SamplingParams(**options),
        seed=seed,
        position=position,
        prompt_ids=np.asarray(prompt, np.int32),
        generated_ids=np.asarray(generated, np.int32),
    )


def shares(logits: Any, draws: int = 4000, **options: Any) -> NDArray[np.float64]:
    counts = np.zeros(len(logits))
    for position in range(draws):
        counts[draw(logits, position, **options)] += 1
    return counts / draws


def softmax(logits: Any) -> NDArray[np.float64]:
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return weights / weights.sum()


def test_temperature_zero_takes_the_likeliest_and_of_equals_the_lowest_id() -> None:
    assert draw([0.1, 2.0, 2.0, -1.0], temperature=0) == 1


def test_top_k_of_one_is_greedy() -> None:
    assert {draw([0.0, 0.1, 0.05], position, top_k=1) for position in range(50)} == {1}


def test_draws_follow_the_distribution() -> None:
    logits = [1.0, 0.0, -1.0, 2.0]
    np.testing.assert_allclose(shares(logits), softmax(logits), atol=0.03)


def test_temperature_flattens() -> None:
    logits = [1.0, 0.0, -1.0, 2.0]
    np.testing.assert_allclose(shares(logits, temperature=3.0), softmax(np.array(logits) / 3), atol=0.03)


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = np.zeros(1000)
    first = [draw(logits, position, seed=7) for position in range(20)]
    assert [draw(logits, position, seed=7) for position in reversed(range(20))] == first[::-1]
    assert [draw(logits, position, seed=8) for position in range(20)] != first
    assert len(set(first)) > 15


def philox(counter: int, seed: int, position: int) -> int:
    """The first word of Philox4x64-10 (Salmon et al. 2011) with counter (counter, 0, 0, 0) and key (seed, position)."""
    mask = 2**64 - 1
    words, key = [counter, 0, 0, 0], [seed, position]
    for _ in range(10):
        first, second = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
        words = [second >> 64 ^ words[1] ^ key[0], second & mask, first >> 64 ^ words[3] ^ key[1], first & mask]
        key = [key[0] + 0x9E3779B97F4A7C15 & mask, key[1] + 0xBB67AE8584CAA73B & mask]
    return words[0]


@pytest.mark.parametrize("key", [(0, 0), (1, 2), (2**64 - 1, 2**31)])
def test_uniform_numbers_are_those_of_philox(key: tuple[int, int]) -> None:
    """Another generator would change every seeded text."""
    assert philox(0, 0, 0) == 0x16554D9ECA36314C  # known answer of Random123
    assert uniform(*key) == (philox(1, *key) >> 11) / 2**53


def test_top_k_keeps_the_lowest_ids_of_equals() -> None:
    assert set(np.flatnonzero(shares([1.0, 1.0, 2.0, 1.0], 300, top_k=3))) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(np.flatnonzero(shares(logits, 400, top_p=0.45))) == {0}
    assert set(np.flatnonzero(shares(logits, 400, top_p=0.6))) == {0, 1}
    kept = shares(logits, top_p=0.9)
    np.testing.assert_allclose(kept, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(np.flatnonzero(shares(logits, 400, min_p=0.5))) == {0, 1}


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = [1.0, 0.9, 0.5]
    assert draw(logits, temperature=0, prompt=[0, 0], presence_penalty=1.0) == 0
    assert draw(logits, temperature=0, generated=[0], presence_penalty=0.2) == 1
    assert draw(logits, temperature=0, generated=[0, 1], presence_penalty=0.2) == 0
    assert draw(logits, temperature=0, generated=[0, 0, 1], frequency_penalty=0.2) == 1


def test_repetition_penalty_lowers_either_sign_in_prompt_and_output() -> None:
    assert draw([2.0, 1.5], temperature=0, prompt=[0], repetition_penalty=2.0) == 1
    assert draw([2.0, 1.5], temperature=0, generated=[0, 0], repetition_penalty=1.2) == 0
    assert draw([-1.0, -1.5], temperature=0, prompt=[0], repetition_penalty=2.0) == 1


def test_logit_bias_forces_and_bans() -> None:
    assert draw([0.0, 5.0, 0.0], temperature=0, logit_bias={2: 100.0}) == 2
    assert 1 not in {draw([0.0, 5.0, 0.0], position, logit_bias={1: -100.0}) for position in range(50)}
    with pytest.raises(ValueError, match="names token 3, the model has 3"):
        draw([0.0, 5.0, 0.0], logit_bias={3: 1.0})


def test_the_logits_are_left_as_they_are() -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    draw(logits, generated=[2], repetition_penalty=2.0, logit_bias={0: 1.0}, top_p=0.5)
    np.testing.assert_array_equal(logits, [1, 2, 3])


def test_infinities_are_ordinary_extremes_and_nan_is_an_error() -> None:
    assert draw([-np.inf, 0.0, -np.inf]) == 1
    assert draw([0.0, np.inf, 5.0]) == 1
    with pytest.raises(ValueError, match="position 9"):
        draw([0.0, np.nan, 1.0], position=9)
