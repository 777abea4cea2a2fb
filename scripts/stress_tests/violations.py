"""Violations of what the routing stress test checks: all are counted, the first are kept in words."""

from __future__ import annotations

from collections.abc import Iterable

from stress_tests.checks import Check, Scoreboard

MOST_WORDS = 40


class Unrecoverable(Exception):
    """The run cannot go on: a violation has been reported."""


class Violations:
    """`words`: the first ones."""

    def __init__(self, scoreboard: Scoreboard) -> None:
        self._scoreboard = scoreboard
        self.words: list[str] = []

    def report(self, check: Check, text: str) -> None:
        """Counts a violation, and tells it."""
        self._scoreboard.violated(check)
        self.tell(check, text)

    def report_all(self, check: Check, texts: Iterable[str]) -> None:
        for text in texts:
            self.report(check, text)

    def tell(self, check: Check, text: str) -> None:
        """Only in words: another process has counted it."""
        if len(self.words) < MOST_WORDS:
            self.words.append(f"{check.title}: {text}")
