"""The dense weights of a model, as the forward pass uses them.

Matrices stay where the checkpoint's mapping has them, in the stored format; norms, which are small, become float32.
"""

from __future__ import annotations

from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.tensor_index import QUANTIZED_DTYPES
from hotset.shm.kv_page_format import QUANT_BLOCK, KvFormat, decode
from hotset.shm.layout import WeightFormat
from hotset.workers.compute import _kernels

Floats = NDArray[np.float32]


class Projection(msgspec.Struct, frozen=True):
    """y = x . weight transposed + bias.

    weight is [outputs, inputs]: float32, float16, or uint16 with the bits of bfloat16; or, `format` then being Q8_0 or
    Q4_0, uint8 [outputs, bytes of a row].
    """

    weight: NDArray[Any]
    bias: Floats | None = None
    format: WeightFormat | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, bias: Floats | None = None) -> Self:
        dtype = checkpoint.tensors[name].dtype
        format = WeightFormat[dtype.upper()] if dtype in QUANTIZED_DTYPES else None
        return cls(checkpoint.dense(name), bias, format)

    def __call__(self, x: Floats) -> Floats:
        out = np.empty((len(x), len(self.weight)), np.float32)
        if self.format is None:
            _kernels.linear(x, self.weight, out)
        else:
            _kernels.linear(x, self.weight, out, self.format)
        if self.bias is not None:
            out += self.bias
        return out

    def of_outputs(self, start: int, count: int) -> Projection:
        """To `count` of the outputs; there must be no bias."""
        return Projection(self.weight[start : start + count], None, self.format)

    def transposed(self, y: Floats) -> Floats:
        """y . weight."""
        if self.format is None:
            out = np.empty((len(y), self.weight.shape[1]), np.float32)
            _kernels.linear_transposed(y, self.weight, out)
            return out
        blocks = self.weight.shape[1] // KvFormat[self.format.name].block_nbytes
        out = np.empty((len(y), blocks * QUANT_BLOCK), np.float32)
        _kernels.linear_transposed(y, self.weight, out, self.format)
        return out


class Embedding(msgspec.Struct, frozen=True):
    """A row of `hidden_size` values for each token; stored like the weight of a projection."""

    weight: NDArray[Any]
    hidden_size: int
    format: KvFormat | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> Self:
        tensor = checkpoint.tensors[name]
        format = KvFormat(tensor.dtype) if tensor.dtype in QUANTIZED_DTYPES else None
        return cls(checkpoint.dense(name), tensor.shape[1], format)

    def __call__(self, token_ids: NDArray[np.int32]) -> Floats:
        rows = self.weight[token_ids]
        return as_float32(rows) if self.format is None else decode(rows, self.format, self.hidden_size)


class FeedForward(msgspec.Struct, frozen=True):
    """down(silu(gate(x)) * up(x)): what an expert computes, with dense weights."""

    gate: Projection
    up: Projection
    down: Projection

    def __call__(self, x: Floats) -> Floats:
        gate = self.gate(x)
        return self.down(gate * sigmoid(gate) * self.up(x))


class SharedExpert(msgspec.Struct, frozen=True):
    """What every row goes through besides the experts that the router chooses, weighted by a gate of its own if it has
    one."""

    router: Projection | None
    feed_forward: FeedForward

    def __call__(self, x: Floats) -> Floats:
        return self.feed_forward(x) if self.router is None else sigmoid(self.router(x)) * self.feed_forward(x)


def as_float32(stored: NDArray[Any]) -> Floats:
    """Stored values (float32, float16, or uint16 with the bits of bfloat16) as new float32 ones."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def sigmoid(x: Floats) -> Floats:
    """Element by element. Below -88, where e^-x would overflow, the result is under 1e-38 either way."""
    return 1 / (1 + np.exp(-np.maximum(x, np.float32(-88))))
