"""Affinity against float64: the scores after a burst of concurrent calls, recomputed from the workers' logs.

A call does not say which epochs it took, but a layer's epochs are given out without gaps: the log has the layer's
epoch before and after each call and the least epoch of the slots it touched (not before its own), and the calls of all
workers must tile the epochs of the burst. A call that still fits in two ways is taken at its earliest and at its
latest, and the score has to lie between the two sums.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.affinity import AffinityConfig

Float64 = npt.NDArray[np.float64]
TOLERANCE = 1e-4


class LoggedCall(msgspec.Struct, frozen=True, array_like=True):
    """A routing call. It took `epochs` epochs after `before` and up to `after`, none of them later than `touched`.

    `epochs` is the number of tokens, or 1 for a step in which each selected expert counts once.
    """

    layer: int
    tokens: int
    epochs: int
    before: int
    after: int
    touched: int


WorkerLog = tuple[list[LoggedCall], npt.NDArray[np.int32]]
"""A worker's calls, in order, and what their tokens selected, [tokens of all calls, top_k]."""


class BurstResult(msgspec.Struct, frozen=True):
    """Scores and counts that the logs lead to, float64 and int64 [layers, experts]; epochs int64 [layers].

    `problems` are calls that fit no free epochs; `ambiguous` counts those that fit several.
    """

    lowest: Float64
    highest: Float64
    activations: npt.NDArray[np.int64]
    epochs: npt.NDArray[np.int64]
    tokens: int
    ambiguous: int
    problems: list[str]


def place_calls(calls: list[LoggedCall], first: int, last: int) -> tuple[list[tuple[int, int]], list[str]]:
    """Earliest and latest first epoch of each call of one layer; the calls tile the epochs first + 1 .. last."""
    taken = np.zeros(last - first, np.bool_)  # by index of epoch - first - 1
    placed: list[tuple[int, int] | None] = [None] * len(calls)
    open_calls = list(range(len(calls)))
    problems: list[str] = []
    while open_calls:
        still_open: list[int] = []
        for index in open_calls:
            call = calls[index]
            stop = min(call.after, call.touched, last) - call.epochs
            fits = [
                start
                for start in range(max(call.before, first), stop + 1)
                if not taken[start - first : start - first + call.epochs].any()
            ]
            if not fits:
                problems.append(f"no free epochs for {call}")
                placed[index] = (call.before + 1, call.before + 1)
            elif len(fits) == 1:
                taken[fits[0] - first : fits[0] - first + call.epochs] = True
                placed[index] = (fits[0] + 1, fits[0] + 1)
            else:
                placed[index] = (fits[0] + 1, fits[-1] + 1)
                still_open.append(index)
        if len(still_open) == len(open_calls):
            break
        open_calls = still_open
    return [place for place in placed if place is not None], problems


def replay(
    config: AffinityConfig,
    start_scores: Float64,
    start_epochs: npt.NDArray[np.int64],
    end_epochs: npt.NDArray[np.int64],
    logs: list[WorkerLog],
) -> BurstResult:
    """What a burst makes of `start_scores` [layers, experts], which are true at `start_epochs` [layers]."""
    layers, experts = start_scores.shape
    elapsed = (end_epochs - start_epochs)[:, np.newaxis]
    lowest = start_scores * config.decay**elapsed
    highest = lowest.copy()
    activations = np.zeros((layers, experts), np.int64)
    epochs = np.zeros(layers, np.int64)
    tokens = ambiguous = 0
    problems: list[str] = []
    for layer in range(layers):
        calls: list[LoggedCall] = []
        selections: list[npt.NDArray[np.int32]] = []
        for log, selected in logs:
            at = 0
            for call in log:
                if call.layer == layer:
                    calls.append(call)
                    selections.append(selected[at : at + call.tokens])
                at += call.tokens
        places, found = place_calls(calls, int(start_epochs[layer]), int(end_epochs[layer]))
        problems += found
        for call, ids, (earliest, latest) in zip(calls, selections, places, strict=True):
            np.add.at(activations[layer], ids, 1)
            epochs[layer] += call.epochs
            tokens += call.tokens
            ambiguous += earliest != latest
            if call.epochs < call.tokens:  # a step: each expert counts once
                ids = np.unique(ids)[np.newaxis]
            rows = np.arange(len(ids))[:, np.newaxis]
            for scores, begin in ((lowest, earliest), (highest, latest)):
                weight = config.activation_boost * config.decay ** (end_epochs[layer] - begin - rows)
                np.add.at(scores[layer], ids, np.broadcast_to(weight, ids.shape))
    return BurstResult(lowest, highest, activations, epochs, tokens, ambiguous, problems)
