"""The experts of the model that ships with hotset, as safetensors reads them."""

from __future__ import annotations

from functools import cache

import numpy as np
from instances import wait_until
from safetensors import deserialize

from hotset.runtime import ExpertCache
from hotset.runtime.config import TRAINED_MODEL

LAYERS, EXPERTS = 4, 32
PARTS = ("gate", "up", "down")


@cache
def _tensors() -> dict[str, np.ndarray]:
    content = deserialize((TRAINED_MODEL / "model.safetensors").read_bytes())
    return {name: np.frombuffer(t["data"], np.uint16).reshape(t["shape"]) for name, t in content if "experts" in name}


def bits(layer: int, expert: int, part: str) -> np.ndarray:
    """Of a matrix in bfloat16."""
    return _tensors()[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"]


def evict_all(cache: ExpertCache) -> None:
    for layer in range(LAYERS):
        assert cache.page_out(layer, range(EXPERTS)) == []
    assert wait_until(lambda: not any(cache.resident(layer).any() for layer in range(LAYERS)))
