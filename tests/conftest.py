"""Fixtures for all tests."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXIT_SECONDS = 60


def pytest_unconfigure() -> None:
    """At its end the interpreter waits for threads and children that tests have left. What hangs there ends the run
    with the stacks of all threads, as a test that hangs does."""
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=sys.__stderr__)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache, and instances of one session leave nothing to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell that runs the suite in the background has it ignore SIGINT, and so the programs that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def many_open_files() -> Iterator[None]:
    """The next file that is opened has a descriptor beyond the first 1,024, which are all that select() takes."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2048:
        pytest.skip(f"only {limits[1]} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limits[1]))
    fillers = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for filler in fillers:
        os.close(filler)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="session")
def trained_folder() -> Path:
    """The model that ships with the package."""
    folder = Path(__file__).parents[1] / "runtime" / "model" / "trained"
    if not (folder / "model.safetensors").is_file():
        pytest.skip("the trained model is not in runtime/model/trained")
    return folder
