"""Ends a text before any of the stop strings, wherever they fall between pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes pieces of a text on, holding back an end that may turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What of the text so far may be shown, and whether a stop string has come."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish_with(self, piece: str) -> str:
        """The rest of a text that ends with `piece`."""
        text, stopped = self.push(piece)
        held, self._held = self._held, ""
        return text if stopped else text + held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
