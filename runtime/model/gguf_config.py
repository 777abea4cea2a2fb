"""What transformers' config.json and tokenizer_config.json would say of the model in a GGUF file, from its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from hotset.runtime.model.errors import CorruptCheckpoint, UnsupportedModel
from hotset.runtime.model.gguf_file import GgufTensor


class Architecture(msgspec.Struct, frozen=True):
    """How transformers names what llama.cpp calls by `general.architecture`, and what that implies.

    `options` are of config.json, `yarn_options` of its rope_scaling where that is "yarn".
    """

    architecture: str
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_size_option: str = "moe_intermediate_size"
    options: Mapping[str, Any] = {}
    yarn_options: Mapping[str, Any] = {}


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
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        router="mlp.router",
        expert_size_option="intermediate_size",
        options={"interleaved_experts": False},  # the converter separates gate and up
        yarn_options={"truncate": False},  # as it was trained; GGUF has no key for it
    ),
}

CONTROL: Final = 3  # of llama.cpp's token types

# config.json's key: llama.cpp's, behind the architecture's name.
_OPTIONS: Final = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "clip_qkv": "attention.clamp_kqv",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
_ROPE_OPTIONS: Final = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
# What else changes a model's computations, and the values that do not.
_NEUTRAL: Final[Mapping[str, tuple[float, ...]]] = {
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window_pattern": (2,),  # every second layer, which is what gpt-oss has anyway
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),  # -1: as the type of scaling has it
    "rope.scaling.yarn_log_multiplier": (0,),
    "router_logit_softcapping": (0,),
}
_EXPERTS: Final = "ffn_gate_exps.weight"


def refuse_unsupported(path: Path, name: str, metadata: Mapping[str, Any]) -> None:
    """Raises UnsupportedModel naming the key."""
    head_dim = metadata.get(f"{name}.attention.key_length")
    whole_head: Mapping[str, tuple[Any, ...]] = {}
    if head_dim is not None:
        whole_head = {"rope.dimension_count": (head_dim,), "attention.value_length": (head_dim,)}
    for key, neutral in {**_NEUTRAL, **whole_head}.items():
        value = metadata.get(f"{name}.{key}", neutral[0])
        if value not in neutral:
            expected = " or ".join(map(str, neutral))
            raise UnsupportedModel(
                path, f"{name}.{key}", f"{path}: {name}.{key} is {value!r}; hotset supports only {expected}."
            )


def model_config(
    path: Path, name: str, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    """What transformers' config.json would say. Raises CorruptCheckpoint if the file has no experts."""
    architecture = ARCHITECTURES[name]

    def given(options: Mapping[str, str]) -> dict[str, Any]:
        return {key: metadata[f"{name}.{ours}"] for key, ours in options.items() if f"{name}.{ours}" in metadata}

    def rows(tensor: str) -> int:
        return tensors[tensor].shape[-2]

    experts = next((tensor for tensor in tensors if tensor.endswith(_EXPERTS)), None)
    if experts is None:
        raise CorruptCheckpoint(path, f"{path} has no tensor blk.*.{_EXPERTS}, its metadata say there are experts.")
    config = given(_OPTIONS) | {
        "architectures": [architecture.architecture],
        "vocab_size": rows("token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in tensors,
        architecture.expert_size_option: rows(experts),
        "eos_token_id": _end_of_text_ids(metadata),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "mlp_only_layers": [
            layer for layer in range(metadata[f"{name}.block_count"]) if f"blk.{layer}.{_EXPERTS}" not in tensors
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
        if rope["rope_type"] == "yarn":
            rope.update(architecture.yarn_options)
        config["rope_scaling"] = rope
    return config


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' tokenizer_config.json would say: special tokens by the names that chat templates use, and the
    ids of all control tokens, among which a family finds those that end an answer.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    config: dict[str, Any] = {name: tokens[id] for name, id in ids.items() if id is not None}
    types = zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False)
    control = {id: token for id, (token, kind) in enumerate(types) if kind == CONTROL}
    config["added_tokens_decoder"] = {str(id): {"content": token, "special": True} for id, token in control.items()}
    return config


def _end_of_text_ids(metadata: Mapping[str, Any]) -> list[int]:
    """End of text, of a turn and of a message: any of them ends an answer."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = {metadata.get(f"tokenizer.ggml.{key}") for key in keys}
    return sorted(int(number) for number in found if number is not None)
