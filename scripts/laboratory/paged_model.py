"""A model for which paging is the bottleneck: the one that ships is too small, whatever the page cache does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from make_model import parse_arguments, write_model

SCRIPTS = Path(__file__).parents[1]
BUILD = SCRIPTS.parent / "build"  # on a disk, where /tmp may be memory
PREFIX = "paged-"


class CannotMakeModel(Exception):
    """There is no room for it, or no folder."""


@contextlib.contextmanager
def made_model(*options: str) -> Iterator[Path]:
    """README's 6 GB model, unless the `options` of make_model.py make it another one. It is removed in the end, and if
    this process is killed, by the next that makes one. Raises `CannotMakeModel`."""
    BUILD.mkdir(exist_ok=True)
    with contextlib.ExitStack() as ending:
        with _locked(BUILD):  # nobody sees a folder that is not locked yet
            _remove_abandoned()
            folder = ending.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=BUILD))
            ending.enter_context(_locked(Path(folder)))
        try:
            write_model(Path(folder), parse_arguments([folder, *options]))
        except OSError as error:
            raise CannotMakeModel(str(error)) from None
        yield Path(folder)


def _remove_abandoned() -> None:
    for folder in BUILD.glob(PREFIX + "*"):
        with contextlib.suppress(OSError), _locked(folder, fcntl.LOCK_NB):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path, flags: int = 0) -> Iterator[None]:
    """By an open descriptor, with which the kernel lets go of it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(fd)
