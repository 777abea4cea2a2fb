"""The expert half of a layer, in three steps: group the chosen experts, compute each once, add in rank order.

The worker chooses the experts, pins their slots, and calls these in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import compress
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.config_options import ExpertLayout
from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels

_LAYOUTS: Final[Mapping[ExpertLayout, int]] = {
    "gate_up_down": _kernels.GATE_UP_DOWN,
    "interleaved_with_biases": _kernels.INTERLEAVED_WITH_BIASES,
    "gate_up_down_with_biases": _kernels.GATE_UP_DOWN_WITH_BIASES,
}


def group_by_expert(
    expert_ids: NDArray[np.int32], kept: NDArray[np.bool_] | None = None
) -> dict[int, NDArray[np.int64]]:
    """For expert_ids [n, k]: each distinct expert, ascending, with its assignments (row * k + rank), ascending. `kept`
    [n, k]: which of them to regard."""
    if len(expert_ids) == 1:  # most steps, and numpy would take a tenth of a step's time in all of its layers
        pairs = zip(expert_ids[0].tolist(), _single_assignments(expert_ids.shape[1]), strict=True)
        return dict(sorted(pairs if kept is None else compress(pairs, kept[0].tolist())))
    flat = expert_ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    if kept is not None:
        order = order[kept.reshape(-1)[order]]
    if not len(order):
        return {}
    sorted_ids = flat[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_ids[1:] != sorted_ids[:-1])))
    return dict(zip(sorted_ids[starts].tolist(), np.split(order, starts[1:]), strict=True))


@cache
def _single_assignments(top_k: int) -> list[NDArray[np.int64]]:
    """[0], [1] ... [top_k - 1]: a single row's."""
    return np.split(np.arange(top_k), top_k)


def experts_forward(
    hidden: NDArray[np.float32],
    assignments: Sequence[NDArray[np.int64]],
    slots: Sequence[NDArray[np.uint8]],
    formats: Sequence[WeightFormat | int],
    config: ModelConfig,
    outputs: NDArray[np.float32],
) -> None:
    """Compute some experts, each for all of its rows.

    hidden [n, hidden_size], normalised. Of each expert: its assignments, as `group_by_expert` gives them; its slot,
    uint8, the expert's parts one after another (runtime/model/expert_parts.py); and the format they are in. Writes
    outputs [n, k, hidden_size] at each assignment's (row, rank) and nothing else.
    """
    layout, inner, limit = _LAYOUTS[config.expert_layout], config.intermediate_size, config.swiglu_limit
    _kernels.experts(hidden, list(assignments), list(slots), list(formats), inner, outputs, layout, limit)


def row_norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean norms along the last axis."""
    norms = np.empty(rows.shape[:-1], np.float32)
    _kernels.row_norms(rows.reshape(-1, rows.shape[-1]), norms.reshape(-1))
    return norms


def combine_in_rank_order(outputs: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of outputs [n, k, hidden_size] times weights [n, k], rank 0 first: the order in which the experts
    became available does not show in the result.
    """
    result = np.empty((outputs.shape[0], outputs.shape[2]), np.float32)
    _kernels.combine(outputs, weights, result)
    return result
