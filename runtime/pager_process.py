"""The pager of an arena as a child process: started, replaced when it dies, and stopped."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from typing import Any

from hotset.runtime.messages.message import ProcessFailed
from hotset.runtime.messages.pager import FromPager, PagerReady, StartPager
from hotset.runtime.watched_child import FailedStarts, Fatal, WatchedChild, reap_all

PAGER_MODULE = "hotset.workers.pager"


class PagerProcess:
    """Starts the interpreter at once, and its work with `start`. Raises `Fatal`, from wherever the selector calls back,
    when there cannot be a pager.

    Args:
        selector: see `WatchedChild`.
        on_message: is told what pagers say.
        on_death: is told the process id of one that is a zombie. The next one makes sense of the slots that it left
            (Arena.recover).
        options: of `Child`.

    Attributes:
        is_ready: whether there is one that serves.
        restarts: so far.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        on_message: Callable[[FromPager], None],
        on_death: Callable[[int], None],
        **options: Any,
    ) -> None:
        self._selector = selector
        self._on_message = on_message
        self._on_death = on_death
        self._options = options
        self._failed_starts = FailedStarts()
        self.is_ready = False
        self.restarts = 0
        self._child = self._spawn()

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self, message: StartPager) -> None:
        """Once the arena is there."""
        self._start = message
        self._child.send(message)

    def stop(self) -> None:
        """Those who wait for experts must have left."""
        self._child.ask_to_leave(working=self.is_ready)
        reap_all([self._child])

    def _spawn(self) -> WatchedChild[FromPager]:
        return WatchedChild[FromPager](
            PAGER_MODULE, FromPager, "the pager", self._selector, self._hear, self._replace, **self._options
        )

    def _hear(self, message: FromPager) -> None:
        match message:
            case PagerReady():
                self.is_ready = True
            case ProcessFailed(reason):
                raise Fatal(f"pager: {reason}")
            case _:
                pass
        self._on_message(message)

    def _replace(self) -> None:
        dead, was_ready = self._child, self.is_ready
        dead.hear()
        self._on_death(dead.pid)
        self._failed_starts.note_death(was_ready, "pager", dead.bury())
        self.restarts += 1
        self.is_ready = False
        self._child = self._spawn()
        self.start(self._start)
