"""A checkpoint of random experts, and what every expert's bytes are: from the seed alone, not from any loader."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from hotset.runtime.expert_slots import SLOT_ALIGNMENT, ExpertClass
from hotset.runtime.model.tensor_index import TENSORS_JSON, StoredTensor, nbytes_of
from hotset.shm.layout import WeightFormat

WIDTH = 128  # of hidden states, and within an expert
# Every third expert each. Not 0: a slot whose format was never written is told apart.
FORMATS = (WeightFormat.FLOAT16, WeightFormat.Q8_0, WeightFormat.Q4_0)
_CONTENTS = "contents.bin"
_WEIGHTS = "weights.bin"
_MATRICES = ("gate_proj", "up_proj", "down_proj")


def format_of(expert: int) -> WeightFormat:
    return FORMATS[expert % len(FORMATS)]


def nbytes_of_expert(expert: int) -> int:
    return len(_MATRICES) * (nbytes_of(format_of(expert).name.lower(), (WIDTH, WIDTH)) or 0)


def classes_of_experts(count: int) -> list[ExpertClass]:
    """The sizes of slots that this many experts take."""
    sizes = Counter(-(-nbytes_of_expert(expert) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT for expert in range(count))
    return [ExpertClass(number, nbytes) for nbytes, number in sizes.items()]


class SyntheticExperts:
    """The expected bytes of each expert.

    Attributes:
        contents: of each expert uint8 [nbytes]: gate, up and down projection; mapped, so shared.
        checksums: xxh3-64 of each.
    """

    def __init__(self, folder: Path) -> None:
        contents: npt.NDArray[np.uint8] = np.memmap(folder / _CONTENTS, np.uint8, "r")
        self.contents: list[npt.NDArray[np.uint8]] = []
        while len(contents):
            nbytes = nbytes_of_expert(len(self.contents))
            self.contents.append(contents[:nbytes])
            contents = contents[nbytes:]
        self.checksums = [xxhash.xxh3_64_intdigest(content) for content in self.contents]


def write_checkpoint(folder: Path, *, num_layers: int, num_experts: int, top_k: int, seed: int) -> None:
    """An OLMoE checkpoint whose dense tensors nobody reads, and whose experts are random bytes of several formats."""
    random = np.random.default_rng(seed)
    tensors: dict[str, StoredTensor] = {}
    with (folder / _CONTENTS).open("wb") as contents, (folder / _WEIGHTS).open("wb") as weights:
        for number in range(num_layers * num_experts):
            layer, expert = divmod(number, num_experts)
            dtype, nbytes = format_of(number).name.lower(), nbytes_of_expert(number) // len(_MATRICES)
            for matrix in _MATRICES:
                name = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                tensors[name] = StoredTensor(_WEIGHTS, weights.tell(), nbytes, dtype, (WIDTH, WIDTH))
                data = random.bytes(nbytes)
                contents.write(data)
                weights.write(data)
        for name, shape in _dense_shapes(num_layers, num_experts).items():
            nbytes = 2 * prod(shape)
            tensors[f"{name}.weight"] = StoredTensor(_WEIGHTS, weights.tell(), nbytes, "float16", shape)
            weights.write(bytes(nbytes))
    (folder / TENSORS_JSON).write_bytes(msgspec.json.encode(tensors))
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": 2,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "max_position_embeddings": 16,
        "eos_token_id": 0,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def _dense_shapes(num_layers: int, num_experts: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (2, WIDTH),
        "model.norm": (WIDTH,),
        "lm_head": (2, WIDTH),
    }
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{prefix}.self_attn.{name}_norm": (WIDTH,) for name in "qk"}
        shapes |= {f"{prefix}.{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
        shapes[f"{prefix}.mlp.gate"] = (num_experts, WIDTH)
    return shapes
