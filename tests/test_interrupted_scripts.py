"""Ctrl-C while a script of `scripts`, or a child of it, starts: it is neither lost nor answered with a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from instances import wait_until

from hotset.shm.segment import PREFIX, SHM_FOLDER

SCRIPTS = Path(__file__).parents[1] / "scripts"
PATHS = os.pathsep.join([str(SCRIPTS), str(SCRIPTS / "benchmarks")])


ENV_BLOCKS = (
    subprocess.run(["env", "--block-signal=INT", "true"], stderr=subprocess.DEVNULL, check=False).returncode == 0
)


def is_python(process: subprocess.Popen[str]) -> bool:
    """And no longer the shell script, or env, which it was before."""
    return Path(f"/proc/{process.pid}/cmdline").read_text().startswith(sys.executable)


@pytest.mark.skipif(not ENV_BLOCKS, reason="env of this system cannot block signals")
@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("laboratory.hitrate --model runtime/model/trained", "hitrate: stopped\n"),
        ("laboratory.gates", "gates: stopped\n"),
        ("stress_tests.routing", "stopped\n"),
        ("stress_tests.kv", "stopped\n"),
    ],
)
def test_a_signal_at_any_moment_of_the_start_ends_it(module: str, said: str) -> None:
    for number, delay in ((signal.SIGINT, 0.0), (signal.SIGTERM, 0.1), (signal.SIGINT, 0.3)):
        process = subprocess.Popen(
            [SCRIPTS / "until_ready", sys.executable, "-P", "-m", *module.split()],
            cwd=SCRIPTS.parent,
            env=os.environ | {"PYTHONPATH": PATHS},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert wait_until(lambda process=process: is_python(process))
        time.sleep(delay)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors.rpartition("\r")[2]) == (130, said), f"after {delay} s"


@pytest.mark.parametrize(("number", "benchmark"), [(signal.SIGINT, "routing"), (signal.SIGTERM, "paging")])
def test_a_benchmark_takes_what_it_has_made_with_it(number: signal.Signals, benchmark: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, SCRIPTS / "benchmarks" / "run.py", benchmark],
        env=os.environ | {"PYTHONPATH": PATHS, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert wait_until(lambda: [*SHM_FOLDER.glob(f"{PREFIX}{process.pid}-*")] and [*tmp_path.iterdir()], 60)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and f"bench {benchmark}: stopped" in errors and "Traceback" not in errors
    assert not [*SHM_FOLDER.glob(f"{PREFIX}{process.pid}-*")] and not [*tmp_path.iterdir()]


def has_spawned(process: subprocess.Popen[str]) -> bool:
    """Whether it has a child that `multiprocessing` has just started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return any(b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


@pytest.mark.parametrize("delay", [0.1, 0.2])
@pytest.mark.parametrize(
    "command",
    [
        [str(SCRIPTS / "benchmarks" / "run.py"), "routing", "--seconds", "0.01"],
        ["-m", "stress_tests.kv", "--workers", "1", "--publications", "10"],
    ],
)
def test_a_terminal_stops_children_that_are_starting_too(command: list[str], delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", *command],
        env=os.environ | {"PYTHONPATH": PATHS},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert wait_until(lambda: has_spawned(process), 60)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # and so all have ended that have its stderr
    assert process.returncode == 130 and "stopped" in errors and "Traceback" not in errors
    assert not [*SHM_FOLDER.glob(f"{PREFIX}{process.pid}-*")]
