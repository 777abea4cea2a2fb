"""A checkpoint of random experts, and what every expert's bytes are: from the seed alone, not from any loader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors.numpy import save_file

from hotset.shm.layout import WeightFormat

HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 128
EXPERT_NBYTES = 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE * 2  # float16; whole pages, so that a slot has no padding
EXPERT_FORMAT = WeightFormat.FLOAT16  # not 0: a slot whose format was never written is told apart
_CONTENTS = "contents.npy"


class SyntheticExperts:
    """The expected bytes of each expert.

    Attributes:
        contents: uint8 [layers * experts, EXPERT_NBYTES]: gate, up and down projection; mapped, so shared.
        checksums: xxh3-64 of each row.
    """

    def __init__(self, folder: Path) -> None:
        self.contents: npt.NDArray[np.uint8] = np.load(folder / _CONTENTS, mmap_mode="r")
        self.checksums = [xxhash.xxh3_64_intdigest(row) for row in self.contents]


def write_checkpoint(folder: Path, *, num_layers: int, num_experts: int, top_k: int, seed: int) -> None:
    """An OLMoE checkpoint whose dense tensors nobody reads, and whose experts are random bytes."""
    random = np.random.default_rng(seed)
    contents = random.integers(0, 256, (num_layers * num_experts, EXPERT_NBYTES), np.uint8)
    np.save(folder / _CONTENTS, contents)
    parts = contents.view(np.float16).reshape(num_layers * num_experts, 3, INTERMEDIATE_SIZE * HIDDEN_SIZE)
    square, row = (HIDDEN_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE,)
    shapes = {
        "model.embed_tokens": (2, HIDDEN_SIZE),
        "model.norm": row,
        "lm_head": (2, HIDDEN_SIZE),
    }
    tensors: dict[str, npt.NDArray[np.float16]] = {}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj": square for name in "qkvo"}
        shapes |= {f"{prefix}.self_attn.{name}_norm": row for name in "qk"}
        shapes |= {f"{prefix}.{name}_layernorm": row for name in ("input", "post_attention")}
        shapes |= {f"{prefix}.mlp.gate": (num_experts, HIDDEN_SIZE)}
        for expert in range(num_experts):
            gate, up, down = parts[layer * num_experts + expert]
            name = f"{prefix}.mlp.experts.{expert}"
            tensors[f"{name}.gate_proj.weight"] = gate.reshape(INTERMEDIATE_SIZE, HIDDEN_SIZE)
            tensors[f"{name}.up_proj.weight"] = up.reshape(INTERMEDIATE_SIZE, HIDDEN_SIZE)
            tensors[f"{name}.down_proj.weight"] = down.reshape(HIDDEN_SIZE, INTERMEDIATE_SIZE)
    tensors |= {f"{name}.weight": np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "vocab_size": 2,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
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
