"""Who a process is: its pid and start time, for a pid alone may be used again."""

from __future__ import annotations

import functools
import uuid
from pathlib import Path


def start_time(pid: int) -> int | None:
    """Clock ticks from boot to the start of `pid`; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in field 2 may hold spaces and brackets: count fields after its last bracket. Start time is field 22.
    return int(stat.rpartition(")")[2].split()[19])


@functools.cache
def boot_id() -> bytes:
    """16 bytes that differ between boots: start times and pids compare only within one."""
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
