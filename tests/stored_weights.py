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
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
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
        if format in (WeightFormat.MXFP4, WeightFormat.MXFP4_GGML):
            return cls(*_mxfp4(values, format))
        array = stored(values, format.name.lower())
        if format == WeightFormat.BFLOAT16:
            return cls(array, (array.astype(np.uint32) << np.uint32(16)).view(np.float32))
        return cls(array, array.astype(np.float32))

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """As they lie in an expert's slot."""
        return np.ascontiguousarray(self.array).reshape(-1).view(np.uint8)


def _mxfp4(values: Floats, format: WeightFormat) -> tuple[NDArray[np.uint8], Floats]:
    """Numbers [outputs, inputs / 2] and behind them scales [outputs, inputs / 32], or GGML's blocks [outputs, inputs /
    32 * 17]; and what they stand for."""
    outputs, inputs = values.shape
    blocks = values.reshape(-1, 32)
    exponents = np.floor(np.log2(np.abs(blocks).max(axis=1, keepdims=True))) - 2
    codes = np.abs(blocks[:, :, None] / np.exp2(exponents)[:, :, None] - E2M1).argmin(axis=2).astype(np.uint8)
    scales = (exponents + 127).astype(np.uint8)
    if format == WeightFormat.MXFP4:
        numbers = codes[:, 0::2] | codes[:, 1::2] << 4
        array = np.concatenate([numbers.reshape(-1), scales.reshape(-1)])
    else:
        array = np.concatenate([scales, codes[:, :16] | codes[:, 16:] << 4], axis=1)
    return array.reshape(outputs, -1), (E2M1[codes] * np.exp2(exponents)).astype(np.float32).reshape(outputs, inputs)
