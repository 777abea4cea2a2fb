"""A control group with a hard memory limit, of either version of the interface."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

MOUNT = Path("/sys/fs/cgroup")
PREFIX = "hotset-test-"


class MemoryCgroup:
    """A group that is removed at the end. Raises OSError where control groups cannot be made.

    Swap counts as memory (v1) or is forbidden (v2): nothing can hide there.
    """

    def __init__(self, limit: int, mount: Path = MOUNT) -> None:
        self.version = 2 if (mount / "cgroup.controllers").exists() else 1
        self._parent = mount if self.version == 2 else mount / "memory"
        self._enabled = self.version == 2 and self._enable_memory()
        self._remove_abandoned()
        self.folder = self._parent / f"{PREFIX}{os.getpid()}-{time.monotonic_ns()}"
        try:
            self.folder.mkdir()
        except OSError:
            self._leave_parent()
            raise
        try:
            if self.version == 2:
                self._write("memory.max", limit)
                if (self.folder / "memory.swap.max").exists():  # not where the kernel cannot swap
                    self._write("memory.swap.max", 0)
            else:
                self._write("memory.limit_in_bytes", limit)
                if (self.folder / "memory.memsw.limit_in_bytes").exists():
                    self._write("memory.memsw.limit_in_bytes", limit)
        except OSError:
            self._remove()
            raise

    def _remove_abandoned(self) -> None:
        """Those of processes that were killed; their own, which end a little later, may still be within."""
        for folder in self._parent.glob(PREFIX + "*"):
            if not Path("/proc", folder.name.removeprefix(PREFIX).partition("-")[0]).exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _enable_memory(self) -> bool:
        """Lets groups of version 2 have memory limits. Whether that was needed, so that it is to be taken back."""
        control = self._parent / "cgroup.subtree_control"
        if "memory" in control.read_text().split():
            return False
        control.write_text("+memory")
        return True

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
                self._remove()
                return
            except OSError:
                time.sleep(0.02)
        self._remove()

    def _remove(self) -> None:
        self.folder.rmdir()
        self._leave_parent()

    def _leave_parent(self) -> None:
        if self._enabled:
            (self._parent / "cgroup.subtree_control").write_text("-memory")
