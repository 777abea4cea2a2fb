"""A model for which paging is the bottleneck: the one that ships is too small, whatever the page cache does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]
BUILD = SCRIPTS.parent / "build"  # on a disk, where /tmp may be memory


@contextmanager
def made_model(*options: str) -> Iterator[Path]:
    """README's 6 GB model, unless the `options` of make_model.py make it another one. It is removed in the end."""
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="paged-", dir=BUILD) as folder:
        command = [sys.executable, "-P", str(SCRIPTS / "make_model.py"), folder, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        yield Path(folder)
