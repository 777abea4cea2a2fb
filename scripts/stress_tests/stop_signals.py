"""Ctrl-C, SIGTERM and SIGHUP end a stress test, or a study, in order: `KeyboardInterrupt` in the main thread, once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

# numpy imports this at its first use, and what Cython does when a module starts swallows a KeyboardInterrupt: it would
# be lost, and all later signals are ignored.
import numpy.random  # noqa: F401

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ignore_stops() -> None:
    """For child processes that their parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Of this process."""

    def __init__(self) -> None:
        self._is_deferred = self._is_pending = False

    def install(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # scripts/until_ready blocks some until here

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """They wait meanwhile, and in children that are started until these call `ignore_stops`: one that is half
        started says so with a traceback."""
        self._is_deferred = True
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            self._is_deferred = False
            if self._is_pending:
                raise KeyboardInterrupt

    def _stop(self, *_: object) -> None:
        ignore_stops()  # once is enough: cleaning up is not to be interrupted
        if self._is_deferred:
            self._is_pending = True
        else:
            raise KeyboardInterrupt


stop_signals = StopSignals()
