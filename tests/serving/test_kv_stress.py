"""The KV stress test: a short run with kills finds nothing, and finds a violation that is planted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from family_models import VOCAB_SIZE
from instances import processes_with, wait_until
from model_factory import make_model

# What scripts/stress kv runs once everything is set up.
STRESS = [sys.executable, "-P", "-m", "stress_tests.kv"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "scripts")}
SMALL = ["--workers", "2", "--publications", "2000", "--seed", "7", "--json"]
CHECKS = {
    "what is published is whole (G2)",
    "every answer is the one a request gets alone",
    "the bookkeeping is consistent (A13)",
    "no request stands still",
    "all pages come back",
    "kept pages keep their bytes (G3)",
    "readers learn of reuse (G3)",
    "nothing is left behind",
}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seconds", "nan"], "--seconds is 'nan', expected a number over 0"),
        (["--publications", "-1"], "--publications is '-1', expected an integer of at least 1"),
        (["--model", ""], "--model is '', expected the path"),
        (["--model", "/nonexistent"], "There is no model folder at /nonexistent"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], sentence: str) -> None:
    done = subprocess.run([*STRESS, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and sentence in done.stderr and done.stdout == ""


def stress(*options: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([*STRESS, *SMALL, *options], env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_workers_and_pager_are_killed_and_every_check_holds() -> None:
    status, result = stress("--seconds", "6")
    assert (status, result["violations"]) == (0, {})
    assert result["checks"].keys() >= CHECKS
    assert all(result["checks"][name] for name in CHECKS)
    assert sum(result["kills"].values()) > 0
    assert result["requests"] > 0 and result["tokens"] > 0


@pytest.mark.parametrize(
    "options",
    [{"family": "gpt_oss", "sliding_window": 20}, {"family": "mixtral", "sliding_window": 20}],
    ids=["some layers", "all layers"],
)
def test_the_same_holds_of_layers_with_windows(options: dict[str, Any], tmp_path: Path) -> None:
    """Prompts take several steps: their workers are killed, and their pages moved, in the middle of them."""
    folder = make_model(
        tmp_path / "model",
        vocab_size=VOCAB_SIZE,
        tokenizer=True,
        dtype="float32",
        max_position_embeddings=512,
        **options,
    )
    status, result = stress("--seconds", "8", "--model", str(folder))
    assert (status, result["violations"]) == (0, {})
    assert sum(result["kills"].values()) > 0
    assert result["migrations"] > 0 and result["pages_moved"] > 0


def test_a_planted_write_into_a_full_page_is_found_and_ends_with_status_1() -> None:
    status, result = stress("--seconds", "4", "--plant")
    assert status == 1
    assert result["violations"]["kept pages keep their bytes (G3)"] > 0


def commands(mark: str) -> list[bytes]:
    """Of the processes of a run."""
    found: list[bytes] = []
    for pid in processes_with("HOTSET_TEST", mark):
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["publishing", "recording", "serving"])
def test_a_run_that_is_stopped_says_nothing_else_and_leaves_nothing(how: signal.Signals, phase: str) -> None:
    mark = f"{os.getpid()}-{phase}-{how}"
    run = subprocess.Popen(
        [*STRESS, "--workers", "1", "--publications", "100000000" if phase == "publishing" else "100"],
        env=ENVIRONMENT | {"HOTSET_TEST": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    reached = {
        "publishing": lambda: len(commands(mark)) == 4,
        "recording": lambda: any(b"runtime.coordinator" in command for command in commands(mark)),
        "serving": lambda: sum(b"spawn_main" in command for command in commands(mark)) == 2,
    }
    try:
        assert wait_until(reached[phase], 60)
        run.send_signal(how)
        said, _ = run.communicate(timeout=20)
        assert wait_until(lambda: not commands(mark), 5), commands(mark)
        told = [line for line in said.splitlines() if not line.startswith("recording ")]
        assert (run.returncode, told) == (130, ["stopped"])
    finally:
        run.kill()
        run.wait()
