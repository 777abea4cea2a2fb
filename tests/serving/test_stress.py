"""The routing stress test: it passes with kills, leaves nothing, and finds each violation that is planted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from instances import processes_of, wait_until

SCRIPTS = Path(__file__).parents[2] / "scripts"
# What scripts/stress runs once everything is set up.
STRESS = [sys.executable, "-P", "-m", "stress_tests.routing"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(SCRIPTS)}
SMALL = ["--workers", "2", "--experts", "32", "--top-k", "4", "--layers", "2", "--seed", "7", "--budget", "45%"]
KEYS = {"routes", "routes_per_second", "p50_us", "p99_us", "checks", "violations", "kills"}


def abandoned() -> set[Path]:
    """Checkpoints of runs that are over; others on this machine may be under way."""
    folders = Path(tempfile.gettempdir()).glob("hotset-stress-*")
    return {folder for folder in folders if not Path("/proc", folder.name.split("-")[2]).exists()}


@pytest.fixture(autouse=True)
def no_checkpoint_left_behind() -> Iterator[None]:
    before = abandoned()
    yield
    assert abandoned() <= before


def stress(*options: str) -> tuple[int, dict[str, Any]]:
    command = [*STRESS, *SMALL, "--json", *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_workers_and_pagers_are_killed_and_every_check_holds() -> None:
    status, result = stress("--seconds", "6", "--kill")
    assert result.keys() >= KEYS
    assert (status, result["violations"], result["violations_in_words"]) == (0, 0, [])
    assert result["kills"] == result["worker_kills"] + result["pager_kills"] > 0
    assert result["routes"] > 0 and result["routes_per_second"] > 0
    assert 0 < result["p50_us"] <= result["p99_us"]
    assert result["page_ins_urgent"] > 0 and result["evictions"] > 0
    assert {name: check["violated"] for name, check in result["checks"].items()} == dict.fromkeys(result["checks"], 0)
    unchecked = [name for name, check in result["checks"].items() if not check["checked"]]
    assert not unchecked
    assert {f"INV-{number}" for number in range(1, 7)} <= result["checks"].keys()


@pytest.mark.parametrize(
    ("planted", "found_by"),
    [
        ("slot-byte", {"INV-1", "INV-5"}),
        ("score", {"INV-2"}),
        ("slot-length", {"INV-3"}),
        ("format", {"INV-4"}),
        ("selection", {"INV-6"}),
        ("use-unpinned", {"pins"}),
        ("dead-pins", {"pins"}),
        ("stopped-pager", {"lost requests"}),
        ("unlogged-activation", {"affinity", "counts"}),
    ],
)
def test_a_planted_violation_is_found_and_ends_with_status_1(planted: str, found_by: set[str]) -> None:
    options = ["--seconds", "2", "--plant", planted]
    if planted == "dead-pins":
        options += ["--kill", "--kills-per-second", "10"]
    if planted == "stopped-pager":
        options += ["--patience", "1"]
    status, result = stress(*options)
    violated = {name for name, check in result["checks"].items() if check["violated"]}
    assert violated >= found_by
    assert status == 1 and result["violations"] > 0 and result["violations_in_words"]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def leave(process: subprocess.Popen[str], how: signal.Signals) -> tuple[list[int], int]:
    """Its children, and how it ended on `how` in the middle of a run."""
    assert wait_until(lambda: len(children_of(process.pid)) == 3, 30)
    time.sleep(0.5)
    children = children_of(process.pid)
    process.send_signal(how)
    return children, process.wait(20)


def start() -> subprocess.Popen[str]:
    command = [*STRESS, *SMALL, "--seconds", "60"]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_takes_everything_with_it(how: signal.Signals) -> None:
    children, status = leave(start(), how)
    assert status == 130
    assert processes_of(children) == []


def test_a_killed_run_takes_its_processes_with_it_and_the_next_removes_the_rest() -> None:
    children, status = leave(start(), signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert wait_until(lambda: processes_of(children) == [])
    assert stress("--seconds", "0.5")[0] == 0


def test_a_budget_that_is_too_small_is_refused_in_one_sentence() -> None:
    command = [*STRESS, *SMALL, "--budget", "5%"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert "5%" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seconds", "nan"], "--seconds is 'nan', expected a number over 0"),
        (["--patience", "-1"], "--patience is '-1', expected a number over 0"),
        (["--seed", "-1"], "--seed is '-1', expected an integer from 0"),
        (["--experts", "100000"], "--experts is '100000', expected an integer from 1 to 1024"),
        (["--top-k", "65"], "--top-k is 65 and --experts is"),
        (["--kills-per-second", "3"], "--kills-per-second is 3, expected --kill beside it"),
    ],
)
def test_options_that_make_no_sense_or_do_nothing_are_refused(options: list[str], sentence: str) -> None:
    done = subprocess.run([*STRESS, *SMALL, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_without_json_it_prints_progress_and_a_table() -> None:
    command = [*STRESS, *SMALL, "--seconds", "1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "routes" in done.stderr and "violations" in done.stderr
    assert all(f"INV-{number}" in done.stdout for number in range(1, 7))
