"""The measuring process of `hotset calibrate`: which strength it takes, and how it cuts its text."""

from __future__ import annotations

import numpy as np
import pytest

from hotset.runtime.calibrator import DEFAULT_TOKENS, CalibrationFailed, Limit, parse_limit
from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.config import ModelConfig
from hotset.workers.calibrate import WARM_UP, cut, strength_within, windows_within_memory

STRENGTHS = (0.05, 0.1, 0.2, 0.4)


def test_the_strength_is_where_the_curve_reaches_the_limit() -> None:
    costs = [0.01 * s + 0.05 * s**2 for s in STRENGTHS]
    found = strength_within(STRENGTHS, costs, [1e-3] * 4, 0.003)
    assert 0.01 * found + 0.05 * found**2 == pytest.approx(0.003, rel=1e-6)


def test_a_cost_that_begins_small_and_rises_steeply_is_followed() -> None:
    costs = [2.0 * s**3.3 for s in STRENGTHS]
    found = strength_within(STRENGTHS, costs, costs, 0.004)
    assert 2.0 * found**3.3 == pytest.approx(0.004, rel=0.1)


def test_chance_in_one_cost_does_not_decide() -> None:
    costs = [0.05 * s**2 for s in STRENGTHS]
    exact = strength_within(STRENGTHS, costs, [1e-3] * 4, 0.002)
    assert exact == pytest.approx(0.2)
    lucky = [costs[0], costs[1] - 1e-3, costs[2], costs[3]]
    assert strength_within(STRENGTHS, lucky, [1e-3] * 4, 0.002) == pytest.approx(exact, rel=0.1)


def test_a_preference_that_costs_less_is_as_strong_as_was_measured_and_no_stronger() -> None:
    assert strength_within(STRENGTHS, [1e-5, 2e-5, 4e-5, 8e-5], [1e-6] * 4, 0.01) == 0.4
    assert strength_within(STRENGTHS, [-1e-5, -2e-5, -4e-5, -8e-5], [1e-6] * 4, 0.01) == 0.4


def test_a_strength_below_all_that_were_measured_can_be_found() -> None:
    found = strength_within(STRENGTHS, [0.1 * s for s in STRENGTHS], [1e-3] * 4, 0.001)
    assert found == pytest.approx(0.01)


def test_a_text_is_cut_into_as_many_tokens_as_it_has() -> None:
    texts = cut(np.arange(100_000, dtype=np.int32), 8_000, 4, 1000, "notes.txt")
    assert texts.shape == (4, WARM_UP + 2, 1001)
    assert cut(np.arange(20_001, dtype=np.int32), None, 4, 1000, "notes.txt").shape == (4, 5, 1001)
    assert cut(np.arange(801, dtype=np.int32), None, 4, 1000, "notes.txt").shape == (4, 2, 101)
    assert cut(np.arange(100_000, dtype=np.int32), None, 4, 1000, "notes.txt")[:, WARM_UP:, 1:].size >= DEFAULT_TOKENS
    with pytest.raises(CalibrationFailed, match=r"notes\.txt has 500 tokens, expected at least 513"):
        cut(np.arange(500, dtype=np.int32), None, 4, 1000, "notes.txt")


def test_a_text_that_has_not_the_tokens_that_were_asked_for_is_refused() -> None:
    assert cut(np.arange(12_001, dtype=np.int32), 8_000, 4, 1000, "notes.txt").shape == (4, WARM_UP + 2, 1001)
    with pytest.raises(
        CalibrationFailed, match=r"notes\.txt has 12,000 tokens, expected at least 12,001 to measure on 8,000 of them"
    ):
        cut(np.arange(12_000, dtype=np.int32), 8_000, 4, 1000, "notes.txt")


def test_windows_take_what_memory_allows() -> None:
    model = ModelConfig.load(TRAINED_MODEL)
    assert windows_within_memory(model, 9, 1 << 40) == (12, 1024)
    row = 4 * 2 * 128 * 4
    assert windows_within_memory(model, 9, 4 * 9 * 6 * 1024 * row) == (6, 1024)
    assert windows_within_memory(model, 9, 4 * 9 * 1 * 256 * row)[1] < 1024


def test_a_limit_is_of_perplexity_or_of_divergence() -> None:
    assert parse_limit(None, "0.25%") == Limit("perplexity", 0.0025)
    assert parse_limit(0.01, None) == Limit("divergence", 0.01)
    for arguments in ((None, None), (0.01, "1%")):
        with pytest.raises(ValueError, match="expected one of the two"):
            parse_limit(*arguments)
    for bad in ("0.25", "0%", "99%", "much", "%"):
        with pytest.raises(ValueError, match=r"--max-ppl is .* expected a percentage over 0 and up to 10"):
            parse_limit(None, bad)
    for wrong in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match=r"--max-kl is .* expected nats over 0 and under 1"):
            parse_limit(wrong, None)
