"""The folder that ships: written from a run's last checkpoint, and read again."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from training.model import ModelShape, OlmoeModel
from training.replaced_file import replace_file
from training.tokenizer import END_OF_TEXT, end_of_text_id


def huggingface_name(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def huggingface_tensors(model: OlmoeModel) -> dict[str, Tensor]:
    """bfloat16 tensors under the names of the published OLMoE checkpoints, one per expert matrix."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("mlp.gate_up"):
            gate, up = value.chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up}
        elif name.endswith("mlp.down"):
            parts = {"down_proj": value}
        else:
            tensors[huggingface_name(name)] = value.bfloat16().contiguous()
            continue
        prefix = "model." + name.rpartition(".")[0]
        for part, stacked in parts.items():
            for expert, matrix in enumerate(stacked):
                tensors[f"{prefix}.experts.{expert}.{part}.weight"] = matrix.bfloat16().contiguous()
    return tensors


def load_exported(folder: Path) -> OlmoeModel:
    """The exported bfloat16 weights, in float32, in this script's model."""
    config = json.loads((folder / "config.json").read_text())
    shape = ModelShape(**{field.name: config[field.name] for field in fields(ModelShape)})
    tensors = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}

    def stacked(prefix: str, part: str) -> Tensor:
        names = [f"{prefix}.experts.{expert}.{part}.weight" for expert in range(shape.num_experts)]
        return torch.stack([tensors[name] for name in names])

    model = OlmoeModel(shape)
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        prefix = "model." + name.rpartition(".")[0]
        if name.endswith("mlp.gate_up"):
            state[name] = torch.cat((stacked(prefix, "gate_proj"), stacked(prefix, "up_proj")), dim=1)
        elif name.endswith("mlp.down"):
            state[name] = stacked(prefix, "down_proj")
        else:
            state[name] = tensors[huggingface_name(name)]
    model.load_state_dict(state)
    return model


def export(work_dir: Path, out: Path) -> None:
    """Write the last checkpoint of work_dir as a folder that `transformers` and hotset load."""
    state = torch.load(work_dir / "checkpoint.pt")
    model = OlmoeModel(ModelShape(**state["shape"]))
    model.load_state_dict(state["model"])
    tokenizer = Tokenizer.from_file(str(work_dir / "tokenizer.json"))
    end = end_of_text_id(tokenizer)
    config = {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **state["shape"],
        "hidden_act": "silu",
        "norm_topk_prob": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": state["shape"]["max_position_embeddings"],
    }
    generation_config = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        replace_file(out / name, partial(Path.write_text, data=json.dumps(content, indent=2) + "\n"))
    replace_file(out / "tokenizer.json", lambda temporary: tokenizer.save(str(temporary)))
    replace_file(
        out / "model.safetensors",
        lambda temporary: save_file(huggingface_tensors(model), temporary, metadata={"format": "pt"}),
    )
