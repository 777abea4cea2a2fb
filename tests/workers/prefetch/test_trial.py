"""Prefetching goes on while steps are faster with it, and stops while they are slower."""

from __future__ import annotations

import random

import pytest

from hotset.workers.prefetch.trial import BLOCK, HOLD, LONGEST_HOLD, PAIRS, Trial

TRIAL_STEPS = 2 * BLOCK * PAIRS


def run(trial: Trial, steps: int, with_it: float, without: float, noise: float = 0.1, rows: int = 1) -> float:
    """The share of steps that prefetched."""
    chance, on = random.Random(0), 0
    for _ in range(steps):
        on += trial.is_on
        trial.note(round(1e6 * (with_it if trial.is_on else without) * chance.lognormvariate(0, noise)), rows)
    return on / steps


@pytest.mark.parametrize(("with_it", "expected"), [(0.85, 1), (1.15, 0), (1.0, 0)])
def test_what_was_faster_holds_after_a_trial(with_it: float, expected: int) -> None:
    trial = Trial()
    assert run(trial, TRIAL_STEPS, with_it, 1) == pytest.approx(0.5, abs=0.1)
    trial.note(1_000_000, 1)
    assert run(trial, HOLD - BLOCK, with_it, 1) == pytest.approx(expected, abs=0.05)


def test_a_machine_that_slows_down_evenly_changes_nothing() -> None:
    trial = Trial()
    for step in range(TRIAL_STEPS + 1):
        trial.note(round((1.05 if trial.is_on else 1) * 1e6 * (1 + step / 20)), 1)
    assert not trial.is_on


def test_it_notices_when_what_held_is_slower_now() -> None:
    trial = Trial()
    run(trial, TRIAL_STEPS + BLOCK, 0.9, 1)
    assert trial.is_on
    run(trial, 8 * (HOLD + TRIAL_STEPS), 1.2, 1)
    assert run(trial, HOLD + TRIAL_STEPS, 1.2, 1) < 0.1


def test_it_notices_when_what_did_not_pay_does_now() -> None:
    trial = Trial()
    run(trial, 4 * HOLD, 1.1, 1)
    assert not trial.is_on
    run(trial, 3 * LONGEST_HOLD, 0.7, 1)
    assert trial.is_on
    assert run(trial, HOLD, 0.7, 1) > 0.9


def test_what_never_pays_is_tried_ever_more_seldom() -> None:
    trial = Trial()
    trying = [run(trial, 8192, 1.15, 1) for _ in range(4)]
    assert trying[0] < 0.02
    assert max(trying[2:]) <= (TRIAL_STEPS / 2) / LONGEST_HOLD


def test_steps_with_another_number_of_rows_are_not_compared() -> None:
    trial, chance = Trial(), random.Random(1)
    for _ in range(4000):
        rows = chance.choice([1, 16])  # sixteen take long, whatever is prefetched
        trial.note(rows * 1_000_000, rows)
    same = Trial()
    assert run(same, TRIAL_STEPS + 1, 1.1, 1, rows=16) == pytest.approx(0.5, abs=0.1)
    assert not same.is_on
