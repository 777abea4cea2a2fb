"""What transformers' config.json and tokenizer_config.json would say of the model in a GGUF file, from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from hotset.runtime.model.gguf_file import GgufTensor


class Architecture(msgspec.Struct, frozen=True):
    """How transformers names what llama.cpp calls by `general.architecture`, and what that implies."""

    architecture: str
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_size_option: str = "moe_intermediate_size"
    options: Mapping[str, Any] = {}


ARCHITECTURES: Final = {
    "olmoe": Architecture("OlmoeForCausalLM", expert_size_option="intermediate_size"),
    "qwen2moe": Architecture("Qwen2MoeForCausalLM"),
    "qwen3moe": Architecture("Qwen3MoeForCausalLM", options={"norm_topk_prob": True}),
    "llama": Architecture(
        "MixtralForCausalLM",
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.gate",
        matrices=("w1", "w3", "w2"),
        expert_size_option="intermediate_size",
        options={"rope_interleave": True},  # llama.cpp reorders the rows of Llama's queries and keys
    ),
}

# config.json's key: llama.cpp's, behind the architecture's name.
_OPTIONS: Final = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "clip_qkv": "attention.clamp_kqv",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
_ROPE_OPTIONS: Final = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}


def model_config(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """What transformers' config.json would say."""
    architecture = ARCHITECTURES[name]

    def given(options: Mapping[str, str]) -> dict[str, Any]:
        return {key: metadata[f"{name}.{ours}"] for key, ours in options.items() if f"{name}.{ours}" in metadata}

    def rows(tensor: str) -> int:
        return tensors[tensor].shape[-2]

    experts = next(tensor for tensor in tensors if tensor.endswith("ffn_gate_exps.weight"))
    config = given(_OPTIONS) | {
        "architectures": [architecture.architecture],
        "vocab_size": rows("token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in tensors,
        architecture.expert_size_option: rows(experts),
        "eos_token_id": _end_of_text_ids(metadata),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "mlp_only_layers": [
            layer
            for layer in range(metadata[f"{name}.block_count"])
            if f"blk.{layer}.ffn_gate_exps.weight" not in tensors
        ],
        **architecture.options,
    }
    for option, tensor in (
        ("shared_expert_intermediate_size", "ffn_gate_shexp.weight"),
        ("intermediate_size", "ffn_gate.weight"),
    ):
        found = next((name for name in tensors if name.endswith(f".{tensor}")), None)
        if found:
            config[option] = rows(found)
    rope = given(_ROPE_OPTIONS)
    if rope.get("rope_type", "none") != "none":
        config["rope_scaling"] = rope
    return config


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """By the names that chat templates use."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    return {name: metadata["tokenizer.ggml.tokens"][id] for name, id in ids.items() if id is not None}


def _end_of_text_ids(metadata: Mapping[str, Any]) -> list[int]:
    """End of text, of a turn and of a message: any of them ends an answer."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = {metadata.get(f"tokenizer.ggml.{key}") for key in keys}
    return sorted(int(number) for number in found if number is not None)
