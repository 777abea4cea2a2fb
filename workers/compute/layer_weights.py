"""The dense weights of one layer, taken from the checkpoint."""

from __future__ import annotations

from typing import Self

import msgspec

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.tensors import layer_tensors
from hotset.workers.compute.heads import Heads, LatentHeads, SeparateHeads
from hotset.workers.compute.weights import FeedForward, Floats, Projection, SharedExpert, as_float32


class LayerWeights(msgspec.Struct, frozen=True):
    """One layer without its experts. What it does not have is None; it has either `router` or `dense`."""

    input_norm: Floats
    heads: Heads
    output: Projection
    sinks: Floats | None
    feed_forward_norm: Floats
    router: Projection | None
    shared: SharedExpert | None
    dense: FeedForward | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: int) -> Self:
        parts = _Parts(checkpoint, layer)
        return cls(
            input_norm=parts.vector("input_norm"),
            heads=_heads(checkpoint.config, parts),
            output=parts.projection("output"),
            sinks=parts.optional_vector("sinks"),
            feed_forward_norm=parts.vector("feed_forward_norm"),
            router=parts.projection("router") if "router" in parts else None,
            shared=SharedExpert(
                parts.projection("shared_router") if "shared_router" in parts else None, parts.feed_forward("shared")
            )
            if "shared_gate" in parts
            else None,
            dense=parts.feed_forward("dense") if "dense_gate" in parts else None,
        )


class _Parts:
    """Those of one layer (runtime/model/tensors.py), as they are in the checkpoint."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._checkpoint = checkpoint
        self._tensors = layer_tensors(checkpoint.config, layer)

    def __contains__(self, part: str) -> bool:
        return part in self._tensors

    def vector(self, part: str) -> Floats:
        return as_float32(self._checkpoint.dense(self._tensors[part].name))

    def optional_vector(self, part: str) -> Floats | None:
        return self.vector(part) if part in self else None

    def projection(self, part: str) -> Projection:
        return Projection.of(self._checkpoint, self._tensors[part].name, self.optional_vector(f"{part}_bias"))

    def feed_forward(self, part: str) -> FeedForward:
        return FeedForward(*(self.projection(f"{part}_{matrix}") for matrix in ("gate", "up", "down")))


def _heads(config: ModelConfig, parts: _Parts) -> Heads:
    query_norm = parts.optional_vector("query_norm")
    if config.latent is None:
        projections = (parts.projection(part) for part in ("query", "key", "value"))
        return SeparateHeads(config, *projections, query_norm, parts.optional_vector("key_norm"))
    return LatentHeads(
        config,
        config.latent,
        query_down=parts.projection("query_down") if "query_down" in parts else None,
        query_norm=query_norm,
        query=parts.projection("query"),
        down=parts.projection("latent"),
        norm=parts.vector("latent_norm"),
        from_latent=parts.projection("from_latent"),
    )
