"""Source "transitions": what the tokens that used these experts here used in the next layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hotset.workers.prefetch.source import Float32, Int32, LayerStep, RankedSource

SLOWEST_RATE = 1 / 1024  # of learning: what an expert's tokens did longer ago is forgotten


class Transitions(RankedSource):
    """A table for every two layers with experts that follow one another: `table[i, r, e]` is how likely a token that
    used expert r in the first uses e in the second, a mean over the tokens seen, later a moving one. The score of e is
    its mean over the r that a token uses now.

    Learns from every step that it is shown. What is learned can be kept in a file.

    Args:
        layers: those with experts, ascending.
        num_experts: of each.
    """

    edges = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self._layers = layers
        self._index = {layer: index for index, layer in enumerate(layers)}
        self._table = np.zeros((len(layers) - 1, num_experts, num_experts), np.float32)
        self._seen = np.zeros((len(layers) - 1, num_experts), np.float32)
        self._last: tuple[int, Int32] = -1, np.empty((0, 0), np.int32)

    def target(self, layer: int) -> int | None:
        index = self._index[layer] + 1
        return self._layers[index] if index < len(self._layers) else None

    def observe(self, step: LayerStep) -> None:
        index = self._index[step.layer]
        (last, experts), self._last = self._last, (index, step.experts)
        if last == index - 1 and len(experts) == len(step.experts):
            self._learn(last, experts, step.experts)

    def scores(self, step: LayerStep) -> Float32:
        return self._table[self._index[step.layer]][step.experts].mean(axis=1).max(axis=0)

    def _learn(self, index: int, before: Int32, after: Int32) -> None:
        table, seen = self._table[index], self._seen[index]
        for used, following in zip(before, after, strict=True):
            seen[used] += 1
            rates = np.maximum(1 / seen[used], SLOWEST_RATE)
            rows = table[used] * (1 - rates)[:, None]
            rows[:, following] += rates[:, None]
            table[used] = rows

    def content(self) -> bytes:
        """Of a file for `load`."""
        return self._header() + self._seen.tobytes() + self._table.tobytes()

    def load(self, path: Path) -> bool:
        """Whether there was a file of a model of this shape; what it says replaces what has been learned."""
        try:
            content = path.read_bytes()
        except OSError:
            return False
        header = self._header()
        if not content.startswith(header) or len(content) != len(header) + self._seen.nbytes + self._table.nbytes:
            return False
        values = np.frombuffer(content, np.float32, offset=len(header))
        if not (np.isfinite(values).all() and (values >= 0).all()):
            return False
        self._seen[:] = values[: self._seen.size].reshape(self._seen.shape)
        self._table[:] = values[self._seen.size :].reshape(self._table.shape)
        return True

    def _header(self) -> bytes:
        return b"transitions" + np.array(self._table.shape, "<i8").tobytes().ljust(29, b"\0")
