"""scripts/setup, as far as it can be tried without an installation."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from instances import processes_of, wait_until

SETUP = Path(__file__).parents[1] / "scripts" / "setup"


def test_a_second_setup_says_that_it_waits_for_the_first(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    with (tmp_path / ".venv" / "setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen(
            [shutil.copy(SETUP, tmp_path / "scripts")], stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert second.stderr is not None
        try:
            assert second.stderr.readline() == "hotset: waiting for another setup of this folder\n"
        finally:
            os.killpg(second.pid, signal.SIGKILL)
            second.communicate()


@pytest.mark.parametrize(
    ("how", "whole_group"),
    [(how, False) for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] + [(signal.SIGKILL, True)],
)
def test_an_installer_does_not_outlive_a_setup_that_is_killed(
    tmp_path: Path, how: signal.Signals, whole_group: bool
) -> None:
    for folder in ("scripts", "shm", "runtime", "workers", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "bin" / "python3"  # which makes the environment in a process of its own, as pip does its work
    python.write_text(f'#!/bin/sh\n[ "$2" = venv ] || exit 0\nsleep 600 &\necho $$ $! >{tmp_path}/pids\nwait\n')
    python.chmod(0o755)
    setup = subprocess.Popen(
        [shutil.copy(SETUP, tmp_path / "scripts")],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"},
        start_new_session=whole_group,
    )
    assert wait_until((tmp_path / "pids").is_file) and wait_until((tmp_path / "pids").read_text)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(processes_of(pids)) == 2
    if whole_group:
        os.killpg(setup.pid, how)
    else:
        setup.send_signal(how)
    errors = setup.communicate(timeout=60)[1].splitlines()
    assert errors[0].startswith("hotset: creating .venv")
    assert (setup.returncode, errors[1:]) == {
        signal.SIGINT: (130, ["hotset: interrupted"]),
        signal.SIGTERM: (143, ["hotset: terminated"]),
    }.get(how, (-how, []))
    assert wait_until(lambda: not processes_of(pids))
