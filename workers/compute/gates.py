"""The gates of all layers, applied to any hidden state: what a layer would choose if the state reached it as it is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.tensors import layer_tensors
from hotset.workers.compute import _kernels
from hotset.workers.compute.weights import Floats, Projection, as_float32


def selection_bias(checkpoint: Checkpoint) -> Floats | None:
    """[layers, num_experts]: what a gate adds to its scores where it chooses experts, for families in which it does."""
    config = checkpoint.config
    if not config.family.selection_bias:
        return None
    bias = np.zeros((config.num_layers, config.num_experts), np.float32)
    for layer in range(config.num_layers):
        tensor = layer_tensors(config, layer).get("selection_bias")
        if tensor is not None:
            bias[layer] = as_float32(checkpoint.dense(tensor.name))
    return bias


class Gates:
    """Weights stay where the checkpoint's mapping has them, as those of the forward pass, which are the same.

    Attributes:
        layers: those with experts, ascending.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._epsilon = config.rms_norm_eps
        self._gates: dict[int, tuple[Floats, Projection]] = {}
        for layer in range(config.num_layers):
            tensors = layer_tensors(config, layer)
            if "router" in tensors:
                norm, bias = (
                    as_float32(checkpoint.dense(tensors[part].name)) if part in tensors else None
                    for part in ("feed_forward_norm", "router_bias")
                )
                self._gates[layer] = norm, Projection.of(checkpoint, tensors["router"].name, bias)
        self.layers = list(self._gates)

    def ahead(self, layer: int, distance: int) -> int | None:
        """The layer with experts that is the `distance`th after `layer`, or None if the model ends before."""
        index = self.layers.index(layer) + distance
        return self.layers[index] if index < len(self.layers) else None

    def __call__(self, layer: int, residual: NDArray[np.float32]) -> Floats:
        """Gate logits [n, num_experts] of `layer` for hidden states [n, hidden_size] before its norm."""
        norm, gate = self._gates[layer]
        normed = np.empty_like(residual)
        _kernels.rms_norm(residual, norm, self._epsilon, normed)
        return gate(normed)
