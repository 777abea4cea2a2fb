"""Ctrl-C and SIGTERM for commands, which end in order and without a traceback. `Backend` has no part in it."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Stopped(BaseException):
    """Raised by a signal: by the first to end in order, by the second to end at once. Further ones are ignored."""


class StopSignals:
    """While a command imports its modules, and when it has ended, signals only wait to be noticed: an exception in the
    middle of an import may come out as anything. Inside `with stop_signals:` they raise `Stopped`.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._heard = False

    def install(self) -> None:
        for number in self.NUMBERS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.NUMBERS)  # scripts/until_ready blocks them until here

    def uninstall(self) -> None:
        """For the very end: an interpreter that is leaving would make a traceback of a further signal, or die of it."""
        for number in self.NUMBERS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number))
        if self._heard and len(self._received) <= 2:
            raise Stopped

    def __enter__(self) -> None:
        self._heard = True
        if self._received:
            raise Stopped

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._heard = False

    @property
    def status(self) -> int:
        """What the command exits with: 0 if no signal came, 130 after Ctrl-C, as shells have it."""
        return 128 + self._received[0] if self._received else 0

    @property
    def words(self) -> str:
        return "interrupted" if self._received[:1] == [signal.SIGINT] else "terminated"


stop_signals = StopSignals()
"""Of this process. Nobody hears them before `install`."""
