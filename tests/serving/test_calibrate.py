"""`hotset calibrate`: what it finds is what a backend uses; what fails or is stopped leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from instances import wait_until

from hotset.runtime import Backend

COMMAND = [sys.executable, "-P", "-m", "hotset.runtime.cli", "calibrate"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=100)


def test_what_is_found_is_what_a_backend_uses(cache: Path) -> None:
    with Backend(workers=1) as backend:
        brought = backend.stats().preference
    text = cache / "text.py"
    text.write_text(Path(__file__).read_text() * 2)
    done = run("--max-kl", "0.004", "--text", str(text), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["routing"], found["limit"]) == ("substitute", "KL 0.004 with 25% of the experts in memory")
    quarter = next(expected for expected in found["expectations"] if expected["budget"] == 0.25)
    assert quarter["divergence"] == pytest.approx(0.004, rel=0.5)
    assert quarter["hit_rate"] > quarter["exact_hit_rate"] > 0
    with Backend(workers=1) as backend:
        preference = backend.stats().preference
        assert (preference.strength, preference.source) == (found["strength"], "calibrated")
        assert preference.strength != brought.strength
    with Backend(workers=1, substitute_limit=0.5) as backend:
        assert backend.plan.routing.source == "given"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "neither of --max-kl and --max-ppl is given"),
        (["--max-ppl", "lots"], "--max-ppl is 'lots', expected a percentage"),
        (["--max-kl", "0.01", "--routing", "off"], "--routing is 'off', expected one of bonus"),
        (["--max-kl", "0.01", "--eviction", "clock"], "eviction is 'clock', expected one of"),
        (["--max-kl", "0.01", "--expert-budget", "4GB"], "--expert-budget is '4GB', expected a percentage"),
        (["--max-kl", "0.01", "--expert-budget", "1%"], "expected at least one of a layer's 32 experts"),
        (["--max-kl", "0.01", "--text", "/nowhere"], "--text is '/nowhere', expected a file"),
        (["/nowhere", "--max-kl", "0.01"], "/nowhere"),
    ],
)
def test_bad_arguments_end_in_one_sentence(cache: Path, arguments: list[str], sentence: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_a_text_that_is_too_short_or_no_text_is_refused(cache: Path) -> None:
    short, binary, some = cache / "short", cache / "binary", cache / "some"
    short.write_text("import os\n")
    binary.write_bytes(b"\xff\xfe\x00")
    some.write_text("import os\n" * 1000)
    for path, options, sentence in (
        (short, (), f"{short} has"),
        (binary, (), "is not text in UTF-8"),
        (some, ("--tokens", "100000"), f"{some} has"),
    ):
        done = run("--max-kl", "0.01", "--text", str(path), *options)
        assert done.returncode == 1 and done.stdout == ""
        assert sentence in done.stderr and done.stderr.count("\n") == 1  # no line of a progress bar
    assert not list(cache.rglob("calibration*"))


@pytest.mark.parametrize("root", ["/proc/nowhere", "/dev/null"])
def test_a_calibration_that_could_not_be_kept_is_not_begun(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", root)
    done = run("--max-kl", "0.01")
    assert done.returncode == 1 and done.stdout == ""
    assert f"the calibration cannot be kept in {root}/hotset/models/" in done.stderr and done.stderr.count("\n") == 1


def test_ctrl_c_leaves_nothing(cache: Path) -> None:
    running = subprocess.Popen([*COMMAND, "--max-kl", "0.01"], stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    assert wait_until(lambda: len(children.read_text().split()) == 1)
    (child,) = map(int, children.read_text().split())
    assert wait_until(lambda: "calibrate" in Path(f"/proc/{child}/cmdline").read_text())
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130 and "interrupted" in errors
    assert wait_until(lambda: not Path(f"/proc/{child}").exists())
    assert not list(cache.rglob("*calibration*"))
