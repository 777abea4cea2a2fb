"""Sleeping until a layer's residency changes: the futex, across processes."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment, remove_ipc_objects

LONG = 30_000_000  # microseconds; a test that waits so long has failed

SLEEPER = """
import sys, msgspec
from hotset.shm import segment
from hotset.shm.geometry import Geometry
segment.PREFIX = sys.argv[1]
arena = segment.Segment.attach("mine", msgspec.json.decode(sys.argv[2], type=Geometry)).arena
layer, seen = int(sys.argv[3]), int(sys.argv[4])
print("sleeping", flush=True)
while arena.generation(layer) == seen:
    arena.wait(layer, seen, 30_000_000)
print(arena.generation(layer), arena.find(75), flush=True)
"""


@pytest.fixture
def shared(instance: str, geometry: Geometry) -> Iterator[Segment]:
    segment = Segment.create(instance, geometry)
    yield segment
    segment.close()
    remove_ipc_objects(instance)


@contextmanager
def sleeper(namespace: str, geometry: Geometry, layer: int, seen: int) -> Iterator[subprocess.Popen[str]]:
    arguments = [namespace, msgspec.json.encode(geometry).decode(), str(layer), str(seen)]
    with subprocess.Popen([sys.executable, "-c", SLEEPER, *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "sleeping\n"
        try:
            yield child
        finally:
            child.kill()


def test_a_waiter_in_another_process_is_woken_by_a_page_in(shared: Segment, namespace: str, geometry: Geometry) -> None:
    with sleeper(namespace, geometry, 1, 0) as one, sleeper(namespace, geometry, 1, 0) as two:
        shared.arena.load_begin(4, 75)
        shared.arena.load_publish(4, 0, 0, 0, False)
        shared.arena.wake(1)
        assert one.communicate(timeout=20)[0] == two.communicate(timeout=20)[0] == "1 4\n"


def test_a_wake_between_reading_the_generation_and_sleeping_is_not_lost(private: Segment) -> None:
    seen = private.arena.generation(2)
    private.arena.wake(2)
    private.arena.wait(2, seen, LONG)
    assert private.arena.generation(2) == seen + 1


def test_every_layer_has_a_generation_of_its_own(private: Segment) -> None:
    private.arena.wake(1)
    private.arena.wake(1)
    assert [private.arena.generation(layer) for layer in range(3)] == [0, 2, 0]


def test_a_wait_ends_after_its_timeout(private: Segment) -> None:
    private.arena.wait(0, 0, 1000)
    private.arena.wait(0, 0, 0)
    assert private.arena.generation(0) == 0


def test_a_wait_lets_other_threads_run(private: Segment) -> None:
    """The wake comes from a thread of the waiter's own process: it needs the GIL."""
    waker = threading.Timer(0.05, private.arena.wake, [0])
    waker.start()
    private.arena.wait(0, 0, LONG)
    waker.join()
    assert private.arena.generation(0) == 1
