"""Processes that this one forks, with all that it has in memory. None outlives it: one that spins for what will never
come would hold the output of a run open, and with it whoever waits for the end of that."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from hotset.shm import _core

FORK = multiprocessing.get_context("fork")  # spawned children could not import a test's module by name
PATIENCE = 120.0  # seconds; only a failing test waits that long


def _run(parent: int, task: Callable[[], None]) -> None:
    if not _core.die_with_parent(parent):
        os._exit(1)
    task()


@contextmanager
def forked(*tasks: Callable[[], Any]) -> Iterator[list[BaseProcess]]:
    """A process for each; at the end of the block all must come to an end with status 0."""
    children: list[BaseProcess] = []
    try:
        for task in tasks:
            children.append(FORK.Process(target=_run, args=(os.getpid(), task), daemon=True))
            children[-1].start()
        yield children
        for child in children:
            child.join(PATIENCE)
            assert child.exitcode == 0
    finally:
        for child in children:  # one that failed leaves others waiting for it
            child.kill()


def raised_in_a_fork(action: Callable[[], object]) -> str:
    """What a forked process that does this raises, as text; "" for nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(100)  # whatever locks of its parent's threads it has: it does not outlive the test
        try:
            action()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(child, 0)
    return text
