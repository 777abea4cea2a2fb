"""What the benchmarks refuse, before the first run of many."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.parametrize(
    ("benchmark", "arguments", "sentence"),
    [
        ("serving", ["--budgets", "0"], "the expert budget is '0%', expected"),
        ("serving", ["--budgets", ""], "--budgets is '' and --memory is not given"),
        ("serving", ["--memory", "much"], "--memory is 'much', expected bytes"),
        ("serving", ["--routing", "off,best"], "routing is 'best', expected one of"),
        ("serving", ["--tokens", "0"], "--tokens is '0', expected an integer of at least 1"),
        ("prefetch", ["--trace", "/dev/zero"], "there is no trace at /dev/zero"),
        ("prefetch", ["--trace", "x", "--model", "y"], "not allowed with"),
        ("routing", ["--seconds", "nan"], "--seconds is 'nan', expected a number over 0"),
        ("paging", ["--rounds", "0"], "--rounds is '0', expected"),
        ("compute", ["--threads", "999"], "--threads is '999', expected an integer from 1 to 256"),
        ("attention", ["--repeats", "-1"], "--repeats is '-1', expected"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(benchmark: str, arguments: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmarks" / "run.py"), benchmark, *arguments],
        env=os.environ | {"PYTHONPATH": str(SCRIPTS)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (1, 2) and sentence in done.stderr
    assert done.stdout == "" and done.stderr.count("\n") == 1
