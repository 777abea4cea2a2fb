"""Ctrl-C, SIGTERM and SIGHUP end a stress test in order: `KeyboardInterrupt` in the main thread, once."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_in_order() -> None:
    for number in SIGNALS:
        signal.signal(number, _stop)


def ignore_stops() -> None:
    """For child processes that their parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _stop(*_: object) -> None:
    ignore_stops()  # once is enough: cleaning up is not to be interrupted
    raise KeyboardInterrupt
