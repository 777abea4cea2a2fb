"""What tests of whole instances look at: their processes and what they leave behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import posix_ipc

from hotset.shm.segment import PREFIX, SHM_FOLDER, InstanceLock, InstanceNameTaken, queue_name

PROMPTS = [
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self",
    "import os\nimport sys\n",
    "for key, value in ",
]


def segment_exists(instance: str) -> bool:
    return (SHM_FOLDER / f"{PREFIX}{instance}").exists()


def abandoned() -> list[str]:
    """Instances of this user whose segment is there but whose coordinator is not; others may run meanwhile."""
    names: list[str] = []
    for path in SHM_FOLDER.glob(PREFIX + "*"):
        name = path.name.removeprefix(PREFIX)
        try:
            InstanceLock(name).release()
        except (InstanceNameTaken, ValueError):
            continue
        if path.exists():  # it was not just being removed
            names.append(name)
    return names


def queue_exists(instance: str) -> bool:
    try:
        posix_ipc.MessageQueue(queue_name(instance)).close()
    except posix_ipc.ExistentialError:
        return False
    return True


def processes_of(pids: list[int]) -> list[int]:
    """Those of `pids` that still run, zombies not counted."""
    running: list[int] = []
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            running.append(pid)
    return running


def processes_with(name: str, value: str) -> list[int]:
    """Those that inherited an environment variable, zombies not counted."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{name}={value}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], object], seconds: float = 10.0, *, pause: float = 0.01) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(pause)
    return bool(condition())
