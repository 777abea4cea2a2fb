"""What decoding a text under each setting gave, kept in a file as it comes: a long study can be stopped and resumed.

A line of the file is one setting: what was decoded, and its loss, divergence, hits and misses in every window.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.workers.simulated_instance import Setting
from hotset.workers.simulation import Outcome, Simulation

SETTINGS_AT_ONCE = 8  # each takes KV pages and its share of every step


class Text(msgspec.Struct, frozen=True):
    """What is decoded: [texts, windows, tokens] of a stream, the first `warm_up` windows of each text uncounted; by the
    model of that `model_identity`."""

    model: str
    texts: int
    windows: int
    tokens: int
    warm_up: int

    @property
    def counted_windows(self) -> int:
        """Of each text."""
        return self.windows - self.warm_up

    @property
    def counted_tokens(self) -> int:
        return self.texts * self.counted_windows * self.tokens


class Line(msgspec.Struct, frozen=True):
    """One setting's sums over the tokens of each counted window, in the same order for all lines of a text."""

    text: Text
    setting: Setting
    loss: list[float]
    divergence: list[float]
    hits: list[int]
    misses: list[int]

    def of_instances(self, name: str) -> npt.NDArray[np.float64]:
        """Sums over the texts that an instance decodes at once, of every instance and window."""
        return (
            np.array(getattr(self, name), np.float64)
            .reshape(-1, self.setting.batch, self.text.counted_windows)
            .sum(1)
            .ravel()
        )


def line_of(text: Text, setting: Setting, outcome: Outcome) -> Line:
    def counted(values: npt.NDArray[np.float64] | npt.NDArray[np.int64]) -> list[float]:
        return values[:, text.warm_up :].ravel().tolist()

    hits, misses = ([int(v) for v in counted(values)] for values in (outcome.hits, outcome.misses))
    return Line(text, setting, counted(outcome.loss), counted(outcome.divergence), hits, misses)


def read_lines(path: Path, text: Text) -> dict[Setting, Line]:
    """Of an earlier study of the same text; a last line that was cut short is left out."""
    found: dict[Setting, Line] = {}
    for raw in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = msgspec.json.decode(raw, type=Line)
        except msgspec.DecodeError:
            continue
        if line.text == text:
            found[line.setting] = line
    return found


def measure(
    model: Path,
    text: Text,
    tokens: npt.NDArray[np.int32],
    settings: Sequence[Setting],
    results: Path | None,
    report: object = None,
) -> dict[Setting, Line]:
    """Lines of all settings. `tokens` int32 [texts, windows, tokens + 1]; `report(done, of)` counts settings."""
    found = read_lines(results, text) if results else {}
    exact = [setting for setting in settings if setting.routing == "off" and setting not in found]
    others = [setting for setting in settings if setting.routing != "off" and setting not in found]
    groups = [others[at : at + SETTINGS_AT_ONCE] for at in range(0, len(others), SETTINGS_AT_ONCE)]
    if exact and not groups:
        groups = [[]]
    for group in groups:
        simulation = Simulation(model, tokens, group)
        reference, *outcomes = simulation.run()
        lines = [line_of(text, setting, outcome) for setting, outcome in zip(group, outcomes, strict=True)]
        for setting in exact:
            hits, misses = simulation.exact_hits(setting)
            lines.append(line_of(text, setting, Outcome(reference.loss, reference.divergence, hits, misses)))
        exact = []
        for line in lines:
            found[line.setting] = line
            if results:
                with results.open("ab") as file:
                    file.write(msgspec.json.encode(line) + b"\n")
        if callable(report):
            report(len(found), len(settings))
    return {setting: found[setting] for setting in settings}
