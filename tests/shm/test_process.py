"""Telling a process from another one that got its pid later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hotset.shm.process import boot_id, start_time


def test_a_process_has_a_start_time_until_it_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert start_time(child.pid) is not None
    child.communicate(b"\n")
    assert start_time(child.pid) is None


def test_a_name_with_brackets_and_spaces_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) 1 (b"
    program.symlink_to("/bin/cat")
    child = subprocess.Popen([str(program)], stdin=subprocess.PIPE)
    mine = start_time(os.getpid())
    theirs = start_time(child.pid)
    assert mine is not None
    assert theirs is not None
    assert mine <= theirs < mine + 100 * 3600
    child.communicate(b"")


def test_the_boot_id_is_the_kernels() -> None:
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    assert boot_id().hex() == text.strip().replace("-", "")


def test_a_child_learns_that_its_parent_is_gone_already() -> None:
    program = "from hotset.shm import _core; import os; print(_core.die_with_parent(int(os.getppid())))"
    assert subprocess.check_output([sys.executable, "-c", program]) == b"True\n"
    program = "from hotset.shm import _core; print(_core.die_with_parent(1 << 30))"
    assert subprocess.check_output([sys.executable, "-c", program]) == b"False\n"


def test_a_child_dies_with_its_parent() -> None:
    child = (
        "import os, sys, time\n"
        "from hotset.shm import _core\n"
        "_core.die_with_parent(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert start_time(pid) is not None
        process.kill()
        process.wait()
        assert process.stdout.read() == "", "the pipe closes only when the grandchild is gone too"
