"""Which parts of which tensors make up an expert, in the order in which they follow one another in a slot.

A slot holds gate, up and down projection, in GGUF files of gpt-oss each with its biases behind it; or, where the
family's rows of gate and up alternate, both as one matrix, its biases, down projection, its biases. A checkpoint has
tensors for each expert, or for all experts of a layer at once.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

import msgspec

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.config_options import MXFP4_BLOCK
from hotset.runtime.model.tensors import Tensor

_MATRICES: Final = ("gate", "up", "down")


class ExpertPart(msgspec.Struct, frozen=True):
    """The `index`th of `of` equal shares of a tensor, along its leading axes.

    `name`: which part of the expert it is. `transposed`: the tensor has a row for each input; the slot is to have a row
    for each output. `dtype`: what it is stored as whatever the other parts are; None: as they are.
    """

    name: str
    tensor: Tensor
    index: int = 0
    of: int = 1
    transposed: bool = False
    dtype: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """In the slot."""
        shape = self.tensor.shape
        if self.of > 1:
            shape = (shape[0] * shape[1] // self.of, *shape[2:])
        return shape[::-1] if self.transposed else shape


def expert_parts(config: ModelConfig, layer: int, expert: int, *, stacked: bool = False) -> tuple[ExpertPart, ...]:
    """`stacked`: the checkpoint has all experts of a layer in one tensor."""
    prefix = f"model.layers.{layer}.{config.family.expert_block}.experts"
    if config.expert_layout == "interleaved_with_biases":
        parts = _interleaved(config, prefix, expert)
        return parts if stacked else tuple(_alone(part, prefix, expert) for part in parts)
    return _stacked(config, prefix, expert) if stacked else _separate(config, f"{prefix}.{expert}")


def are_stacked(config: ModelConfig, names: Container[str]) -> bool:
    """Whether a checkpoint with tensors of these names has its experts stacked."""
    return any(expert_parts(config, layer, 0, stacked=True)[0].tensor.name in names for layer in config.expert_layers)


def _separate(config: ModelConfig, prefix: str) -> tuple[ExpertPart, ...]:
    """A tensor for each matrix of each expert, and for its biases if there are any."""
    inner, hidden = config.intermediate_size, config.hidden_size
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    parts: list[ExpertPart] = []
    for name, matrix, shape in zip(_MATRICES, config.family.expert_matrices, shapes, strict=True):
        parts.append(ExpertPart(name, Tensor(f"{prefix}.{matrix}.weight", shape)))
        if config.expert_layout == "gate_up_down_with_biases":
            parts.append(ExpertPart(f"{name}_bias", Tensor(f"{prefix}.{matrix}.bias", shape[:1]), dtype="float32"))
    return tuple(parts)


def _stacked(config: ModelConfig, prefix: str, expert: int) -> tuple[ExpertPart, ...]:
    """As transformers 5 keeps them: gate above up, for all experts in one tensor."""
    experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    gate_up = Tensor(f"{prefix}.gate_up_proj", (experts, 2 * inner, hidden))
    return (
        ExpertPart("gate", gate_up, 2 * expert, 2 * experts),
        ExpertPart("up", gate_up, 2 * expert + 1, 2 * experts),
        ExpertPart("down", Tensor(f"{prefix}.down_proj", (experts, hidden, inner)), expert, experts),
    )


def _alone(part: ExpertPart, prefix: str, expert: int) -> ExpertPart:
    """An expert's share of a stacked tensor as a tensor of its own, which only packs have (pack.py)."""
    name = part.tensor.name.replace(prefix, f"{prefix}.{expert}")
    tensor = Tensor(name, part.tensor.shape[1:], part.tensor.of_bytes)
    return ExpertPart(part.name, tensor, transposed=part.transposed)


def _interleaved(config: ModelConfig, prefix: str, expert: int) -> tuple[ExpertPart, ...]:
    """As gpt-oss' checkpoints have them: for all experts in one tensor."""
    experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    parts: list[ExpertPart] = []
    for part, outputs, inputs in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        name = f"{part}_proj"
        if config.mxfp4_experts:
            blocks = (experts, outputs, inputs // MXFP4_BLOCK)
            numbers = Tensor(f"{prefix}.{name}_blocks", (*blocks, MXFP4_BLOCK // 2), of_bytes=True)
            scales = Tensor(f"{prefix}.{name}_scales", blocks, of_bytes=True)
            parts.append(ExpertPart(part, numbers, expert, experts))
            parts.append(ExpertPart(f"{part}_scales", scales, expert, experts))
        else:
            matrix = Tensor(f"{prefix}.{name}", (experts, inputs, outputs))
            parts.append(ExpertPart(part, matrix, expert, experts, transposed=True))
        bias = Tensor(f"{prefix}.{name}_bias", (experts, outputs))
        parts.append(ExpertPart(f"{part}_bias", bias, expert, experts))
    return tuple(parts)
