"""Weights in every format that the kernels compute on, with the values that the stored bytes stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from model_factory import stored
from numpy.typing import NDArray

from hotset.shm.kv_page_format import KvFormat, decode, encode
from hotset.shm.layout import WeightFormat

Floats = NDArray[np.float32]
SINGLE_VALUES = (WeightFormat.FLOAT32, WeightFormat.FLOAT16, WeightFormat.BFLOAT16)
FORMATS = tuple(WeightFormat)
_GGML = {WeightFormat.Q8_0: KvFormat.Q8_0, WeightFormat.Q4_0: KvFormat.Q4_0}


class StoredWeights(NamedTuple):
    """A matrix [outputs, inputs] as a checkpoint has it: `array` is what `_kernels.linear` takes, and `values` are
    float32, which hold the values of all formats exactly."""

    array: NDArray[Any]
    values: Floats

    @classmethod
    def of(cls, values: Floats, format: WeightFormat) -> StoredWeights:
        if format in _GGML:
            rows = encode(values, _GGML[format])
            return cls(rows, decode(rows, _GGML[format], values.shape[1]))
        array = stored(values, format.name.lower())
        if format == WeightFormat.BFLOAT16:
            return cls(array, (array.astype(np.uint32) << np.uint32(16)).view(np.float32))
        return cls(array, array.astype(np.float32))

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """As they lie in an expert's slot."""
        return np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)
