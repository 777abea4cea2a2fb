"""Demand records: which experts one step of one layer wanted. shm/core/demands.h has the format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from hotset.shm.segment import Segment

NO_STREAM = 0xFFFF
HEADER_WORDS = 8

Records = npt.NDArray[np.uint16]


def most_rows(top_k: int) -> int:
    """Of one record, whose length is one of its 16-bit words."""
    return (0xFFFF - HEADER_WORDS) // (top_k + 1)


def demand_of_set(layer: int, experts: Sequence[int], stream: int = 0) -> Records:
    """A record of one set."""
    record = np.zeros(HEADER_WORDS + 1 + len(experts), np.uint16)
    record[:4] = len(record), layer, 1, len(experts)
    record[HEADER_WORDS] = stream
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


def split_records(records: Records) -> Iterator[Records]:
    """One record after the other."""
    at = 0
    while at < len(records):
        end = at + int(records[at])
        yield records[at:end]
        at = end


def stamp_of(record: Records) -> int:
    """When it was written, in ns of the monotonic clock."""
    return int.from_bytes(record[4:8].tobytes(), "little")


class DemandReader:
    """Follows the rings of all processes of an instance; a killed process's successor goes on in its ring.

    Args:
        segment: the arena.
    """

    def __init__(self, segment: Segment) -> None:
        geometry = segment.layout.geometry
        self._arena = segment.arena
        self._cursors = [0] * (geometry.num_processes if geometry.demand_words else 0)
        self._written = 0  # words that were there when the rings were last read
        self._words = np.empty(geometry.demand_words, np.uint16)
        self._out = self._words.data  # which C sees into sooner than into an array

    def read(self) -> Iterator[tuple[Records, bool]]:
        """Per process that wrote something since the last call: its records, in order, and whether some were lost
        before they could be read. The array is overwritten by the next."""
        if (written := self._arena.demands_written()) == self._written:
            return
        for process, cursor in enumerate(self._cursors):
            count, self._cursors[process], lost = self._arena.read_demands(process, cursor, self._out)
            if count or lost:
                yield self._words[:count], lost
        self._written = written
