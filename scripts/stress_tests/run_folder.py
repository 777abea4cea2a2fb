"""The folder of one stress run, with its checkpoint, scoreboard and what its processes write to stderr."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

PREFIX = "hotset-stress-"


class RunFolder:
    """`path`, named after the instance. What killed runs have left is removed first."""

    def __init__(self, instance: str) -> None:
        _remove_stale()
        self.path = Path(tempfile.gettempdir()) / (PREFIX + instance)
        self.path.mkdir(mode=0o700)

    @property
    def stderr(self) -> Path:
        return self.path / "stderr"

    def stderr_tail(self) -> str:
        with contextlib.suppress(OSError):
            return self.stderr.read_text()[-4000:]
        return ""

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_stale() -> None:
    """An instance's name begins with its process id."""
    for folder in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        process = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", process).exists():
            shutil.rmtree(folder, ignore_errors=True)
