"""Processes that read KV pages from outside while they are used (G3), and one that writes where it must not."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
import threading
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Self

from stress_tests.stop_signals import ignore_stops, stop_signals

from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.page_reader import PageReader, StalePage
from hotset.shm.segment import Segment

WATCHERS = 2
ANSWER_SECONDS = 30.0


class PageWatchers:
    """Watches while it is entered.

    They speak over pipes and not over a queue or an event, which have named semaphores: a run that is killed would
    leave these behind.
    """

    def __init__(self, instance: str, geometry: Geometry, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = [context.Pipe() for _ in range(WATCHERS)]
        self._processes = [
            context.Process(target=watch_pages, args=(instance, geometry, seed + number, theirs), daemon=True)
            for number, (_, theirs) in enumerate(self._pipes)
        ]

    def __enter__(self) -> Self:
        resource_tracker.ensure_running()  # or the first child starts it, which lets the signals through
        try:
            with stop_signals.deferred():
                for process, (_, theirs) in zip(self._processes, self._pipes, strict=True):
                    process.start()
                    theirs.close()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def finish(self) -> list[tuple[int, int, int]]:
        """Of each how many pages it has checked, how many it found handed out again, and how many changed."""
        for ours, _ in self._pipes:
            ours.send("stop")
        if not all(ours.poll(ANSWER_SECONDS) for ours, _ in self._pipes):
            raise TimeoutError(f"a process that watches pages said nothing for {ANSWER_SECONDS:.0f} s")
        return [ours.recv() for ours, _ in self._pipes]

    def _kill(self) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.kill()  # it only reads
                process.join()


def watch_pages(instance: str, geometry: Geometry, seed: int, parent: Connection) -> None:
    """A reader process (G3): full pages that it kept have their bytes for as long as they have their generation.

    It ends, and sends what it has found, when the parent says anything, and ends when that is gone.
    """
    ignore_stops()
    reader, segment, chance = PageReader(instance, geometry), Segment.attach(instance, geometry), random.Random(seed)
    checked = stale = wrong = 0
    kept: dict[int, tuple[int, bytes]] = {}
    while not parent.poll():
        row, block = chance.randrange(geometry.max_sequences), chance.randrange(geometry.max_blocks)
        before = _full_page(segment, row, block)
        if before:
            generation = reader.generation(before)
            copy = reader.view(before).tobytes()
            # Looked up again: the row may have got another sequence meanwhile, whose pages fill up yet.
            if _full_page(segment, row, block) == before and reader.generation(before) == generation:
                kept.setdefault(before, (generation, copy))
        for page, (generation, copy) in list(kept.items()):
            try:
                checked += 1
                if reader.read(page, generation) != copy:
                    wrong += 1
                    del kept[page]
            except StalePage:
                stale += 1
                del kept[page]
        time.sleep(0.002)
    with contextlib.suppress(BrokenPipeError):
        parent.send((checked, stale, wrong))


def _full_page(segment: Segment, row: int, block: int) -> int:
    """The page at an index of a sequence's block table if all its tokens are committed, else 0."""
    page = segment.arena.load_u32(Section.BLOCK_TABLES, row, block)  # acquire, so before what says that it is full
    committed = segment.arena.load_u64(Section.SEQUENCES, row, 0)
    granted = segment.arena.load_u32(Section.SEQUENCES, row, 2)
    block_size = segment.layout.geometry.block_size
    return page if block < granted and (block + 1) * block_size <= committed else 0


def change_full_pages(instance: str, geometry: Geometry, stopping: threading.Event) -> None:
    """A planted violation: somebody writes into pages that are full."""
    segment = Segment.attach(instance, geometry)
    pages = segment.view(Section.KV_PAGES)
    while not stopping.wait(0.02):
        for row, block in itertools.product(range(geometry.max_sequences), range(geometry.max_blocks)):
            if page := _full_page(segment, row, block):
                pages[page, 0] = time.monotonic_ns() % 256
    segment.close()
