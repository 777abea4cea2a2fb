"""An expert's weights where they lie: named arrays over a slot, nothing copied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config_options import MXFP4_BLOCK
from hotset.runtime.model.conversion import decode_rows
from hotset.runtime.model.tensor_index import STORED_DTYPES
from hotset.shm.segment import Segment

Array = npt.NDArray[Any]

_E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E8M0_BIAS: Final = 127


class PartLayout(NamedTuple):
    """`nbytes` bytes from `start` of a slot on: `shape` values, stored as `dtype` (of tensor_index.py)."""

    name: str
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class ExpertWeights(Mapping[str, Array]):
    """The parts of one expert by name, as they are stored: "gate", "up" and "down", which have a row for each output;
    where the model has them also "gate_bias" and so on; of gpt-oss' own checkpoints "gate_up", in which rows of gate
    and up alternate.

    float32 and float16 are arrays of such; bfloat16, which numpy does not have, is uint16 with its bits; of "q8_0",
    "q4_0" and "mxfp4_ggml" come GGML's blocks, uint8 [rows, bytes of a row]; of "mxfp4" uint8 [rows, blocks, 16], and
    "gate_up_scales" and "down_scales" with them. All are read-only, and what they say once the expert is not pinned any
    more is anybody's guess.

    Attributes:
        format: of the matrices.
        bytes: all parts, one after another.
    """

    def __init__(self, format: str, parts: tuple[PartLayout, ...], slot: npt.NDArray[np.uint8]) -> None:
        self.format = format
        self.bytes = slot[: parts[-1].start + parts[-1].nbytes]
        self._parts = {part.name: part for part in parts}
        self._arrays = {part.name: self._array(part) for part in parts}

    def _array(self, part: PartLayout) -> Array:
        stored = self.bytes[part.start : part.start + part.nbytes]
        if part.dtype in STORED_DTYPES:
            return stored.view(STORED_DTYPES[part.dtype]).reshape(part.shape)
        return stored.reshape(part.shape[0], -1)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """A copy of a part's values; of "mxfp4_ggml" the extra `[gguf]` makes it."""
        stored, part = self._arrays[name], self._parts[name]
        if self.format == "mxfp4" and part.dtype == "uint8":
            return _decode_mxfp4(stored, self._arrays[f"{name}_scales"])
        rows = np.ascontiguousarray(np.atleast_2d(stored)).view(np.uint8)
        return decode_rows(rows, part.dtype).astype(np.float32).reshape(part.shape)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        return f"ExpertWeights({self.format}: {', '.join(self)})"


def _decode_mxfp4(numbers: Array, scales: Array) -> npt.NDArray[np.float32]:
    """Numbers [rows, blocks, 16] and their scales [rows, blocks] -> values [rows, 32 * blocks]."""
    codes = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*scales.shape, MXFP4_BLOCK)
    values = np.ldexp(_E2M1[codes], scales.astype(np.int32)[..., None] - _E8M0_BIAS)
    return values.astype(np.float32).reshape(len(scales), -1)


class SlotWeights:
    """The weights in each slot of an arena, looked at without the right to write them.

    Experts of one format lie in a slot alike, so that what is made for a slot once serves whoever comes to lie there.
    """

    def __init__(self, segment: Segment, checkpoint: Checkpoint) -> None:
        memory = memoryview(segment.memory).toreadonly()
        self._slots = segment.layout.slots(memory)
        self._checkpoint = checkpoint
        self._parts: dict[str, tuple[PartLayout, ...]] = {}
        self._made: dict[tuple[int, str], ExpertWeights] = {}

    def of(self, slot: int, layer: int, expert: int) -> ExpertWeights:
        """Of an expert that lies in this slot."""
        format = self._checkpoint.expert_dtype(layer, expert)
        weights = self._made.get((slot, format))
        if weights is None:
            weights = ExpertWeights(format, self._layout(format, layer, expert), self._slots[slot])
            self._made[slot, format] = weights
        return weights

    def _layout(self, format: str, layer: int, expert: int) -> tuple[PartLayout, ...]:
        if format not in self._parts:
            start, parts = 0, list[PartLayout]()
            stored = self._checkpoint.expert(layer, expert).parts
            for part, location in zip(self._checkpoint.expert_parts(layer, expert), stored, strict=True):
                parts.append(PartLayout(part.name, start, location.nbytes, location.dtype, part.shape))
                start += location.nbytes
            self._parts[format] = tuple(parts)
        return self._parts[format]
