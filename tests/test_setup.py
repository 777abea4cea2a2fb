"""scripts/setup, as far as it can be tried without an installation."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
from pathlib import Path

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
