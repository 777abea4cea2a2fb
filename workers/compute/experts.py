"""The expert half of a layer, in three steps: group the chosen experts, compute each once, add in rank order.

The worker chooses the experts, pins their slots, and calls these in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.config import ModelConfig
from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels


def group_by_expert(expert_ids: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """For expert_ids [n, k]: each distinct expert, ascending, with its assignments (row * k + rank),
    ascending.
    """
    flat = expert_ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    sorted_ids = flat[order]
    starts = np.flatnonzero(np.concatenate(([True], sorted_ids[1:] != sorted_ids[:-1])))
    return zip(sorted_ids[starts].tolist(), np.split(order, starts[1:]), strict=True)


def expert_forward(
    hidden: NDArray[np.float32],
    assignments: NDArray[np.int64],
    slot: NDArray[np.uint8],
    weight_format: WeightFormat | int,
    config: ModelConfig,
    outputs: NDArray[np.float32],
) -> None:
    """Compute one expert for all of its rows.

    hidden [n, hidden_size], normalised; assignments as `group_by_expert` gives them; slot: uint8, the
    expert's parts one after another (runtime/model/expert_parts.py) in `weight_format`. Writes outputs [n, k,
    hidden_size] at each assignment's (row, rank) and nothing else.
    """
    layout = _kernels.INTERLEAVED_WITH_BIASES if config.family.interleaved_experts else _kernels.GATE_UP_DOWN
    inner, limit = config.intermediate_size, config.swiglu_limit
    _kernels.expert(hidden, assignments, slot, weight_format, inner, outputs, layout, limit)


def row_norms(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Euclidean norms along the last axis."""
    return np.sqrt(np.einsum("...i,...i->...", rows, rows))


def combine_in_rank_order(outputs: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of outputs [n, k, hidden_size] times weights [n, k], rank 0 first: the order in which the experts
    became available does not show in the result.
    """
    result = np.empty((outputs.shape[0], outputs.shape[2]), np.float32)
    _kernels.combine(outputs, weights, result)
    return result
