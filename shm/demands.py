"""Demand records: which experts one step of one layer used. shm/core/demands.h has the format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NO_STREAM = 0xFFFF
HEADER_WORDS = 8

Records = npt.NDArray[np.uint16]


def demand_of_set(layer: int, experts: Sequence[int]) -> Records:
    """A record of one set, of no stream in particular."""
    record = np.zeros(HEADER_WORDS + 1 + len(experts), np.uint16)
    record[:4] = len(record), layer, 1, len(experts)
    record[HEADER_WORDS] = NO_STREAM
    record[HEADER_WORDS + 1 :] = experts
    return record


def demands_of_steps(ids: npt.NDArray[np.integer]) -> Records:
    """Records of whole steps, ids [steps, rows, layers, top_k] -> one per step and layer; row i is stream i."""
    steps, rows, layers, top_k = ids.shape
    width = top_k + 1
    records = np.zeros((steps, layers, HEADER_WORDS + rows * width), np.uint16)
    records[..., 0] = records.shape[2]
    records[..., 1] = np.arange(layers)
    records[..., 2] = rows
    records[..., 3] = top_k
    body = records[..., HEADER_WORDS:].reshape(steps, layers, rows, width)
    body[..., 0] = np.arange(rows)
    body[..., 1:] = ids.transpose(0, 2, 1, 3)
    records[..., HEADER_WORDS:] = body.reshape(steps, layers, rows * width)
    return records.reshape(-1)
