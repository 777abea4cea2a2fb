"""The report on the gates: what fails, what could not be measured, and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ["--tokens", "12", "--rounds", "1", "--quality-tokens", "128", "--texts", "2", "--window", "32", "--json"]
# A loaded machine, or a tiny sample, must not decide: every gate is opened wide, but for the one that is planted.
OPEN = "hit-rate=0 perplexity=1e9 step-p99=1e9 memory=1e9 throughput=0 prefetch=0 page-in-p99=1e9 route-mean=1e9 "
OPEN += "route-p99=1e9 routes=0"


def gates(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS / "benchmarks")])
    return subprocess.run(
        [sys.executable, "-P", "-m", "laboratory.gates", *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_one_threshold_that_cannot_be_met_fails_the_report() -> None:
    wanted = [f"--wanted={change}" for change in [*OPEN.split(), "hit-rate=101"]]
    done = gates(*SMALL, *wanted)
    assert done.returncode == 1, done.stderr
    found = {gate["name"]: gate for gate in json.loads(done.stdout)["gates"]}
    assert len(found) == 10
    assert [name for name, gate in found.items() if gate["passed"] is False] == ["hit-rate"]
    assert 0 < found["hit-rate"]["measured"] < 101 and found["hit-rate"]["wanted"] == 101
    for gate in found.values():
        assert gate["how"] and (gate["measured"] is None) == (gate["passed"] is None)


def test_what_could_not_be_measured_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS / "benchmarks"))
    from laboratory.gates import TARGETS, Found, exit_status, judge

    met = [judge(target, Found(target.wanted, "")) for target in TARGETS]
    assert exit_status(met) == 0
    unmeasured = judge(TARGETS[0], Found(None, "no disk"))
    assert unmeasured.passed is None
    assert exit_status([*met, unmeasured]) == 2
    failed = [
        judge(target, Found(target.wanted + (1 if target.sense == "<=" else -1), ""))
        for target in TARGETS
    ]  # fmt: skip
    assert not any(gate.passed for gate in failed)
    assert exit_status([unmeasured, failed[0]]) == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("speed=1", "there is no gate 'speed', expected one of hit-rate"), ("hit-rate", "NAME=NUMBER")],
)
def test_thresholds_of_no_gate_are_refused(wanted: str, message: str) -> None:
    done = gates("--wanted", wanted)
    assert done.returncode == 1 and message in done.stderr
