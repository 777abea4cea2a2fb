"""scripts/hitrate --model: what it measures, keeps, prints and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hotset.runtime.config import TRAINED_MODEL
from hotset.workers.simulated_instance import Setting

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
from laboratory.quality_curves import Curve, Estimate  # noqa: E402
from laboratory.quality_results import Line, Text, read_lines  # noqa: E402

ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPTS)}
SHORT = ("--tokens", 256, "--texts", 4, "--warm-up", 0, "--window", 32, "--budgets", 25, "--policies", "affinity")
TEXT = Text("model", 2, 10, 100, 0)


def hitrate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "laboratory.hitrate", "--model", TRAINED_MODEL, *arguments]
    return subprocess.run([*map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def line(routing: str, strength: float, *, loss: float, hits: int) -> Line:
    """20 windows, each with `loss` nats more than 200, and `hits` of 100."""
    random = np.random.default_rng(0)
    noise = random.normal(size=20)  # the same for all: differences have none
    setting = Setting(routing, strength, "affinity", 8)  # type: ignore[arg-type]
    return Line(TEXT, setting, (200 + noise + loss).tolist(), [loss] * 20, [hits] * 20, [100 - hits] * 20)


def test_a_study_is_measured_once_and_read_again(tmp_path: Path) -> None:
    results = tmp_path / "study.jsonl"
    arguments = (*SHORT, "--routing", "off,resnorm,range", "--strengths", "resnorm=0.1,1", "--strengths", "range=0.1")
    first = hitrate(*arguments, "--results", results, "--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert "256 held-out tokens" in report["name"]
    rows = {(row["routing"], row["strength"]): row for row in report["rows"]}
    assert set(rows) == {("off", 0), ("resnorm", 0.1), ("resnorm", 1), ("range", 0.1)}
    assert rows["off", 0]["divergence"]["value"] == 0
    assert rows["resnorm", 1]["divergence"]["value"] > rows["resnorm", 0.1]["divergence"]["value"] > 0
    assert rows["resnorm", 1]["hit_rate"]["value"] > rows["off", 0]["hit_rate"]["value"]
    for row in report["rows"]:
        assert row["hit_rate"]["low"] <= row["hit_rate"]["value"] <= row["hit_rate"]["high"]
    assert len(results.read_bytes().splitlines()) == 4
    with results.open("ab") as file:
        file.write(b'{"text": {"model": "cut')  # killed while it wrote
    again = hitrate(*arguments, "--results", results)
    assert again.returncode == 0, again.stderr
    assert len(results.read_bytes().splitlines()) == 5  # nothing was measured
    for word in ("25 % of the experts in memory", "resnorm", "range", "KL", "+0.25 %"):
        assert word in again.stdout
    assert len(read_lines(results, TEXT)) == 0  # those of another text do not count


def test_texts_that_share_an_instance_are_resampled_together() -> None:
    """Its hits are in the place of the first of them."""
    hits, misses = [30] * 10 + [0] * 10, [10] * 10 + [0] * 10
    lines = [
        Line(TEXT, Setting(routing, strength, "affinity", 8, batch=2), [loss] * 20, [loss] * 20, hits, misses)
        for routing, strength, loss in (("off", 0.0, 0.0), ("resnorm", 0.1, 1.0))
    ]
    _, row = Curve(lines).rows(25)
    assert row.hit_rate == Estimate(75, 75, 75)
    assert row.perplexity_change.value == pytest.approx(100 * np.expm1(0.01))
    assert row.divergence.value == pytest.approx(0.01)


def test_the_cost_is_paired_and_interpolated_to_the_budget() -> None:
    curve = Curve([
        line("resnorm", 0.2, loss=0.8, hits=90),
        line("off", 0, loss=0, hits=50),
        line("resnorm", 0.1, loss=0.2, hits=80),
    ])  # fmt: skip
    rows = list(curve.rows(25))
    assert [row.hit_rate.value for row in rows] == [50, 80, 90]
    change = rows[2].perplexity_change
    assert change.value == pytest.approx(100 * np.expm1(0.008)) and change.high - change.low < 1e-9
    half = (rows[1].perplexity_change.value + rows[2].perplexity_change.value) / 2
    reached = curve.reached(25, half)
    assert reached.hit_rate.value == pytest.approx(85) and reached.strength == pytest.approx(0.15)
    assert curve.reached(25, 5.0).strength is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--routing", "best"], "--routing has 'best', expected some of off,bonus"),
        (["--strengths", "resnorm"], "--strengths is 'resnorm', expected a routing policy and strengths"),
        (["--strengths", "resnorm=much"], "--strengths is 'much', expected numbers"),
        (["--routing", "off", "--strengths", "range=0.1"], "--strengths are given for range, expected policies of"),
        (["--policies", "min"], "eviction is 'min', expected one of lru"),
        (["--batch", "0"], "--batch is '0', expected numbers of at least 1"),
        (["--budgets", "inf"], "--budgets is 'inf', expected numbers of at least 0"),
        (["--strengths", "range=-1"], "--strengths is '-1', expected numbers of at least 0"),
        (["--tokens", "0"], "--tokens is '0', expected an integer of at least 1"),
        (["--texts", "0"], "--texts is '0', expected an integer of at least 1"),
        (["--window", "0"], "--window is '0', expected an integer of at least 1"),
        (["--warm-up", "-1"], "--warm-up is '-1', expected an integer of at least 0"),
        (["--batch", "3"], "4 texts cannot be decoded 3 at a time"),
        # What comes last in a list is refused before anything is decoded too.
        (["--batch", "1,3", "--tokens", "200000"], "4 texts cannot be decoded 3 at a time"),
        (["--policies", "affinity,best", "--tokens", "200000"], "eviction is 'best', expected one of lru"),
        (["--tokens", "9000000"], "expected at least"),
    ],
)
def test_bad_arguments_end_in_one_sentence(arguments: list[str], sentence: str) -> None:
    done = hitrate(*SHORT, *arguments)
    assert done.returncode in (1, 2) and done.stdout == ""
    assert sentence in done.stderr and done.stderr.count("\n") <= 1


@pytest.mark.parametrize(("option", "mode"), [("--experts", "trace")])
def test_an_option_of_the_other_mode_is_refused(option: str, mode: str) -> None:
    assert f"{option} is for --{mode}" in hitrate(option, 2).stderr
