"""A control group with a hard memory limit, of either version of the interface."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """A group that is removed at the end. Raises OSError where control groups cannot be made.

    Swap counts as memory (v1) or is forbidden (v2): nothing can hide there.
    """

    def __init__(self, limit: int) -> None:
        self.version = 2 if (V2 / "cgroup.controllers").exists() else 1
        self.folder = (V2 if self.version == 2 else V1) / f"hotset-test-{os.getpid()}-{time.monotonic_ns()}"
        self.folder.mkdir()
        try:
            if self.version == 2:
                self._write("memory.max", limit)
                self._write("memory.swap.max", 0)
            else:
                self._write("memory.limit_in_bytes", limit)
                if (self.folder / "memory.memsw.limit_in_bytes").exists():
                    self._write("memory.memsw.limit_in_bytes", limit)
        except OSError:
            self.folder.rmdir()
            raise

    def command(self, *arguments: str) -> list[str]:
        """The arguments as a command that runs, with all of its children, within the group."""
        enter = f'echo $$ > "{self.folder}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *arguments]

    @property
    def oom_kills(self) -> int:
        events = self.folder / ("memory.events" if self.version == 2 else "memory.oom_control")
        values = dict(line.split() for line in events.read_text().splitlines())
        return int(values["oom_kill"])

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in range(100):  # a process that has just died may still be listed
            try:
                self.folder.rmdir()
                return
            except OSError:
                time.sleep(0.02)
        self.folder.rmdir()
