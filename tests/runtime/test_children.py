"""What the coordinator's children say, hear and leave behind, with children that are played by the test."""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterator
from typing import Any

import pytest

from hotset.runtime import watched_child
from hotset.runtime.channel import Channel, channel_pair
from hotset.runtime.children import Children
from hotset.runtime.config import BackendConfig
from hotset.runtime.messages.worker import Progress, RowProgress, RunSequence, StartWorker, ToWorker, WorkerReady
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance
from hotset.runtime.sampling_params import SamplingParams


class PlayedChild:
    """In the place of `Child`: `inside` is the child's end of its channel."""

    def __init__(self, module: str, received: Any) -> None:
        self.pid = os.getpid()
        self.channel, theirs = channel_pair(received)
        self.inside = Channel[Any](theirs, ToWorker)
        self.pidfd, self._alive = os.pipe()

    def die(self) -> None:
        self.inside.close()
        os.close(self._alive)

    def reap(self) -> str:
        os.close(self.pidfd)
        self.channel.close()
        return "was killed by SIGKILL"


class Listener:
    """Writes down what it hears, and who could be given work then."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.children: Children

    def on_worker(self, process: int, message: Any) -> None:
        self.heard.append((process, message))

    def on_progress(self) -> None:
        self.heard.append(("ready", sorted(self.children.ready_workers)))

    def on_worker_death(self, process: int) -> None:
        self.heard.append(("died", process))

    def on_worker_replaced(self, process: int, how: str) -> None:
        self.heard.append(("replaced", process))

    on_pager = on_helper = on_pager_death = on_helper_death = None


class Nursery:
    def __init__(self) -> None:
        config = BackendConfig(workers=2)
        model = ModelConfig.load(config.model)
        plan = plan_instance(config, model, Checkpoint.open(config.model, model))
        self.selector, self.listener = selectors.DefaultSelector(), Listener()
        self.children = self.listener.children = Children("test", config, plan, self.selector, self.listener)  # type: ignore[arg-type]
        self.children.start()
        for process in (0, 1):
            self.worker(process).inside.send(WorkerReady(process))
        self.turn()
        self.listener.heard.clear()

    def worker(self, process: int) -> PlayedChild:
        played: Any = self.children._workers[process].child
        return played

    def turn(self) -> None:
        """What the coordinator's loop does once."""
        for key, _ in self.selector.select(0):
            key.data()


@pytest.fixture
def nursery(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    class Typed(PlayedChild):
        def __class_getitem__(cls, item: Any) -> Any:
            return PlayedChild

    monkeypatch.setattr(watched_child, "Child", Typed)
    nursery = Nursery()
    yield nursery
    nursery.selector.close()


def test_what_a_socket_does_not_take_at_once_is_sent_when_the_child_reads_although_it_says_nothing(
    nursery: Nursery,
) -> None:
    params = SamplingParams(stop=["x" * (1 << 20)])
    messages = [RunSequence(row, 10 + row, 3, 3, 9, params) for row in range(3)]
    for message in messages:
        nursery.children.send_worker(1, message)
    received: list[Any] = []
    for _ in range(1000):
        received += nursery.worker(1).inside.receive()
        nursery.turn()
    assert isinstance(received[0], StartWorker) and received[1:] == messages
    assert nursery.selector.select(0) == []  # nobody is woken for room any more


def test_the_last_words_of_a_worker_are_heard_and_it_is_given_nothing_for_them(nursery: Nursery) -> None:
    last_words = Progress([RowProgress(0, 5)])
    dead = nursery.worker(0)
    dead.inside.send(last_words)
    dead.die()
    # Its death may be noticed before anything else.
    nursery.children._on_worker_death(0)
    assert nursery.listener.heard == [(0, last_words), ("died", 0), ("replaced", 0)]
    assert nursery.children.ready_workers == {1}
    assert nursery.worker(0) is not dead
