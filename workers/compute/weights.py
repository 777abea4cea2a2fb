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
from hotset.runtime.model.tensors import layer_tensors
from hotset.shm.kv_page_format import KvFormat, decode
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
    """What every row goes through besides the experts that the router chooses, weighted by a gate of its own."""

    router: Projection
    feed_forward: FeedForward

    def __call__(self, x: Floats) -> Floats:
        return sigmoid(self.router(x)) * self.feed_forward(x)


class LayerWeights(msgspec.Struct, frozen=True):
    """One layer without its experts. What it does not have is None; it has either `router` or `dense`."""

    input_norm: Floats
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    query_norm: Floats | None
    key_norm: Floats | None
    sinks: Floats | None
    feed_forward_norm: Floats
    router: Projection | None
    shared: SharedExpert | None
    dense: FeedForward | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: int) -> Self:
        tensors = layer_tensors(checkpoint.config, layer)

        def vector(part: str) -> Floats | None:
            return as_float32(checkpoint.dense(tensors[part].name)) if part in tensors else None

        def projection(part: str) -> Projection:
            return Projection.of(checkpoint, tensors[part].name, vector(f"{part}_bias"))

        def feed_forward(part: str) -> FeedForward:
            return FeedForward(*(projection(f"{part}_{matrix}") for matrix in ("gate", "up", "down")))

        return cls(
            input_norm=as_float32(checkpoint.dense(tensors["input_norm"].name)),
            query=projection("query"),
            key=projection("key"),
            value=projection("value"),
            output=projection("output"),
            query_norm=vector("query_norm"),
            key_norm=vector("key_norm"),
            sinks=vector("sinks"),
            feed_forward_norm=as_float32(checkpoint.dense(tensors["feed_forward_norm"].name)),
            router=projection("router") if "router" in tensors else None,
            shared=SharedExpert(projection("shared_router"), feed_forward("shared"))
            if "shared_router" in tensors
            else None,
            dense=feed_forward("dense") if "dense_gate" in tensors else None,
        )


def as_float32(stored: NDArray[Any]) -> Floats:
    """Stored values (float32, float16, or uint16 with the bits of bfloat16) as new float32 ones."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def sigmoid(x: Floats) -> Floats:
    """Element by element. Below -88, where e^-x would overflow, the result is under 1e-38 either way."""
    return 1 / (1 + np.exp(-np.maximum(x, np.float32(-88))))
