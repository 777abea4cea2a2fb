"""What is published is whole (G2): one process fills a page and publishes it, two read it, again and again."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess

import numpy as np
from stress_tests.kv_report import Report
from stress_tests.stop_signals import ignore_stops, stop_signals

from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.segment import InstanceLock, Segment, new_instance_name, remove_ipc_objects

PUBLICATION_SECONDS = 600.0
SMALL = Geometry(
    num_layers=1, num_experts=8, num_pages=2, page_nbytes=4096, max_sequences=1, max_model_len=64, num_processes=2
)


def check_publication(report: Report, rounds: int) -> None:
    """G2: what is published is whole."""
    context = multiprocessing.get_context("fork")
    name = new_instance_name()
    lock = InstanceLock(name)
    children: list[ForkProcess] = []
    try:
        segment = Segment.create(name, SMALL)
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        children.append(context.Process(target=publish, args=(name, rounds), daemon=True))
        for reader, (_, theirs) in enumerate(pipes):
            children.append(context.Process(target=verify, args=(name, reader, rounds, theirs), daemon=True))
        with stop_signals.deferred():
            for child in children:
                child.start()
        deadline = time.monotonic() + PUBLICATION_SECONDS
        if not all(ours.poll(max(0.0, deadline - time.monotonic())) for ours, _ in pipes):
            raise TimeoutError(f"G2 was not done after {PUBLICATION_SECONDS:.0f} s")
        wrong = sum(ours.recv() for ours, _ in pipes)
        segment.close()
        report.check("what is published is whole (G2)", not wrong, f"{wrong} torn reads", times=2 * rounds)
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()  # those that have not ended by themselves
                child.join()
        remove_ipc_objects(name)
        lock.release()


def publish(name: str, rounds: int) -> None:
    """G2's writer: fills a page with a number and publishes it, when both readers have seen the one before."""
    _belong_to_parent()
    segment = Segment.attach(name, SMALL)
    arena, page = segment.arena, segment.view(Section.KV_PAGES)[1].view(np.uint64)
    for number in range(1, rounds + 1):
        page[:] = number
        arena.store_u64(Section.SEQUENCES, 0, 0, number)
        while min(arena.load_u64(Section.COUNTERS, reader, 0) for reader in range(2)) < number:
            os.sched_yield()


def verify(name: str, reader: int, rounds: int, parent: Connection) -> None:
    """G2's reader."""
    _belong_to_parent()
    segment = Segment.attach(name, SMALL)
    arena, page = segment.arena, segment.view(Section.KV_PAGES)[1].view(np.uint64)
    wrong = 0
    for number in range(1, rounds + 1):
        while arena.load_u64(Section.SEQUENCES, 0, 0) < number:
            os.sched_yield()
        wrong += not (page == number).all()
        arena.store_u64(Section.COUNTERS, reader, 0, number)
    parent.send(wrong)


def _belong_to_parent() -> None:
    ignore_stops()
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not _core.die_with_parent(parent.pid):
        os._exit(1)  # it is dead already
