"""What was really read from disk, as the kernel counts it: page-ins that the page cache serves are not in it."""

from __future__ import annotations

from pathlib import Path


def disk_bytes_read(pid: int) -> int:
    """By a process so far, also while it is a zombie; 0 where the kernel does not say."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


class DiskReads:
    """The sum over the pagers of an instance, one after the other."""

    def __init__(self) -> None:
        self._ended = 0
        self._baseline = 0

    def note_death(self, pid: int) -> None:
        """Of a pager that is not reaped yet."""
        self._ended += disk_bytes_read(pid)

    def total(self, pid: int) -> int:
        """Since the last reset; `pid` is the pager that runs now."""
        return self._ended + disk_bytes_read(pid) - self._baseline

    def reset(self, pid: int) -> None:
        self._baseline += self.total(pid)
