"""Which parts of which tensors make up an expert, in the order in which they follow one another in a slot.

A slot holds gate, up and down projection; or, where the family's rows of gate and up alternate, both as one matrix, its
biases, down projection, its biases. A checkpoint has tensors for each expert, or for all experts of a layer at once.
"""

from __future__ import annotations

from collections.abc import Container

import msgspec

from hotset.runtime.model.config import MXFP4_BLOCK, ModelConfig
from hotset.runtime.model.tensors import Tensor


class ExpertPart(msgspec.Struct, frozen=True):
    """The `index`th of `of` equal shares of a tensor, along its leading axes.

    `transposed`: the tensor has a row for each input; the slot is to have a row for each output.
    """

    tensor: Tensor
    index: int = 0
    of: int = 1
    transposed: bool = False


def expert_parts(config: ModelConfig, layer: int, expert: int, *, stacked: bool = False) -> tuple[ExpertPart, ...]:
    """`stacked`: the checkpoint has all experts of a layer in one tensor."""
    prefix = f"model.layers.{layer}.{config.family.expert_block}.experts"
    if config.family.interleaved_experts:
        parts = _interleaved(config, prefix, expert)
        return parts if stacked else tuple(_alone(part, prefix, expert) for part in parts)
    if stacked:
        return _stacked(config, prefix, expert)
    inner, hidden = config.intermediate_size, config.hidden_size
    gate, up, down = (f"{prefix}.{expert}.{matrix}.weight" for matrix in config.family.expert_matrices)
    return (
        ExpertPart(Tensor(gate, (inner, hidden))),
        ExpertPart(Tensor(up, (inner, hidden))),
        ExpertPart(Tensor(down, (hidden, inner))),
    )


def are_stacked(config: ModelConfig, names: Container[str]) -> bool:
    """Whether a checkpoint with tensors of these names has its experts stacked."""
    layers = (layer for layer in range(config.num_layers) if layer not in config.dense_layers)
    return any(expert_parts(config, layer, 0, stacked=True)[0].tensor.name in names for layer in layers)


def _stacked(config: ModelConfig, prefix: str, expert: int) -> tuple[ExpertPart, ...]:
    """As transformers 5 keeps them: gate above up, for all experts in one tensor."""
    experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    gate_up = Tensor(f"{prefix}.gate_up_proj", (experts, 2 * inner, hidden))
    return (
        ExpertPart(gate_up, 2 * expert, 2 * experts),
        ExpertPart(gate_up, 2 * expert + 1, 2 * experts),
        ExpertPart(Tensor(f"{prefix}.down_proj", (experts, hidden, inner)), expert, experts),
    )


def _alone(part: ExpertPart, prefix: str, expert: int) -> ExpertPart:
    """An expert's share of a stacked tensor as a tensor of its own, which only packs have (pack.py)."""
    name = part.tensor.name.replace(prefix, f"{prefix}.{expert}")
    return ExpertPart(Tensor(name, part.tensor.shape[1:], part.tensor.of_bytes), transposed=part.transposed)


def _interleaved(config: ModelConfig, prefix: str, expert: int) -> tuple[ExpertPart, ...]:
    """As gpt-oss' checkpoints have them: for all experts in one tensor."""
    experts, inner, hidden = config.num_experts, config.intermediate_size, config.hidden_size
    parts: list[ExpertPart] = []
    for name, outputs, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        if config.mxfp4_experts:
            blocks = (experts, outputs, inputs // MXFP4_BLOCK)
            numbers = Tensor(f"{prefix}.{name}_blocks", (*blocks, MXFP4_BLOCK // 2), of_bytes=True)
            parts.append(ExpertPart(numbers, expert, experts))
            parts.append(ExpertPart(Tensor(f"{prefix}.{name}_scales", blocks, of_bytes=True), expert, experts))
        else:
            matrix = Tensor(f"{prefix}.{name}", (experts, inputs, outputs))
            parts.append(ExpertPart(matrix, expert, experts, transposed=True))
        parts.append(ExpertPart(Tensor(f"{prefix}.{name}_bias", (experts, outputs)), expert, experts))
    return tuple(parts)
