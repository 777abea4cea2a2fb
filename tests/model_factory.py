"""Random model folders in Hugging Face's layout, made without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# What config.json says of each family beyond the sizes, with names and defaults of the published models.
FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "olmoe": {"architectures": ["OlmoeForCausalLM"], "norm_topk_prob": False},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "norm_topk_prob": True,
        "head_dim": 12,  # 4 heads of 12 make 48, not hidden_size
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 2,
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], "sliding_window": None},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 2,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_shared_experts": 2,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 12,
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 12,
        "attention_bias": True,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 1.0,  # instead of 7, so that small weights reach it
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
}
DEEPSEEK = ("deepseek_v2", "deepseek_v3")
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def make_model(
    folder: Path,
    *,
    family: str = "olmoe",
    vocab_size: int = 260,
    hidden_size: int = 32,
    intermediate_size: int = 24,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 4,
    num_experts: int = 8,
    experts_per_token: int = 2,
    dtype: str = "bfloat16",
    shards: int = 1,
    tokenizer: bool = False,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Write a random model of `family` (its model_type) to `folder` and return it.

    One expert takes 3 * intermediate_size * hidden_size values of dtype (float32, float16, bfloat16). `options` go into
    config.json as they are, over the defaults. With `tokenizer`, bytes are tokens 1 to 256 and 0 ends the text.
    """
    config = {
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "num_experts": num_experts,
        "num_experts_per_tok": experts_per_token,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        "torch_dtype": dtype,
        **FAMILY_OPTIONS[family],
    }
    if family in ("mixtral", "gpt_oss"):
        config["num_local_experts"] = config.pop("num_experts")
    if family in DEEPSEEK:
        config["n_routed_experts"] = config.pop("num_experts")
    if family in ("olmoe", "mixtral", "gpt_oss"):
        config["intermediate_size"] = intermediate_size
    else:  # there, intermediate_size is that of layers without experts
        config |= {"moe_intermediate_size": intermediate_size, "intermediate_size": 2 * intermediate_size}
    config |= options
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shapes = dict(tensor_shapes(config))
    names = list(shapes)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", shapes, dtype, seed)
    else:
        files = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
        weight_map = {name: files[index * shards // len(names)] for index, name in enumerate(names)}
        for number, file in enumerate(files):
            part = {name: shapes[name] for name in names if weight_map[name] == file}
            write_safetensors(folder / file, part, dtype, seed + number)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        write_byte_tokenizer(folder)
    return folder


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        if config["model_type"] in DEEPSEEK:
            yield from latent_attention_shapes(f"{prefix}.self_attn", config)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            yield from deepseek_feed_forward_shapes(f"{prefix}.mlp", config, layer)
            continue
        yield f"{prefix}.self_attn.q_proj.weight", (heads * head_dim, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_heads * head_dim, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_heads * head_dim, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, heads * head_dim)
        if config["model_type"] == "qwen2_moe" and config.get("qkv_bias", True):
            yield f"{prefix}.self_attn.q_proj.bias", (heads * head_dim,)
            yield f"{prefix}.self_attn.k_proj.bias", (kv_heads * head_dim,)
            yield f"{prefix}.self_attn.v_proj.bias", (kv_heads * head_dim,)
        if config.get("attention_bias"):
            for matrix, width in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                yield f"{prefix}.self_attn.{matrix}_proj.bias", (width * head_dim,)
            yield f"{prefix}.self_attn.o_proj.bias", (hidden,)
        if config["model_type"] == "olmoe":
            yield f"{prefix}.self_attn.q_norm.weight", (heads * head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (kv_heads * head_dim,)
        if config["model_type"] == "qwen3_moe":
            yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        if layer in config.get("mlp_only_layers", []) or (layer + 1) % config.get("decoder_sparse_step", 1):
            yield from feed_forward_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
            continue
        if config["model_type"] == "gpt_oss":
            yield f"{prefix}.self_attn.sinks", (heads,)
            yield from gpt_oss_shapes(f"{prefix}.mlp", config)
            continue
        if config["model_type"] == "mixtral":
            yield f"{prefix}.block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
            inner = config["intermediate_size"]
            for expert in range(config["num_local_experts"]):
                for matrix, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                    yield f"{prefix}.block_sparse_moe.experts.{expert}.{matrix}.weight", shape
            continue
        yield f"{prefix}.mlp.gate.weight", (config["num_experts"], hidden)
        if config["model_type"] == "qwen2_moe":
            yield f"{prefix}.mlp.shared_expert_gate.weight", (1, hidden)
            inner = config["shared_expert_intermediate_size"]
            yield from feed_forward_shapes(f"{prefix}.mlp.shared_expert", hidden, inner)
        inner = config.get("moe_intermediate_size", config["intermediate_size"])
        for expert in range(config["num_experts"]):
            yield from feed_forward_shapes(f"{prefix}.mlp.experts.{expert}", hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def latent_attention_shapes(prefix: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    plain, rotary, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    if config["q_lora_rank"] is None:
        yield f"{prefix}.q_proj.weight", (heads * (plain + rotary), hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (config["q_lora_rank"], hidden)
        yield f"{prefix}.q_a_layernorm.weight", (config["q_lora_rank"],)
        yield f"{prefix}.q_b_proj.weight", (heads * (plain + rotary), config["q_lora_rank"])
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (rank + rotary, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (rank,)
    yield f"{prefix}.kv_b_proj.weight", (heads * (plain + value), rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * value)
    if config["attention_bias"]:
        if config["q_lora_rank"] is not None:
            yield f"{prefix}.q_a_proj.bias", (config["q_lora_rank"],)
        yield f"{prefix}.kv_a_proj_with_mqa.bias", (rank + rotary,)
        yield f"{prefix}.o_proj.bias", (hidden,)


def deepseek_feed_forward_shapes(
    prefix: str, config: dict[str, Any], layer: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    if layer < config["first_k_dense_replace"]:
        yield from feed_forward_shapes(prefix, hidden, config["intermediate_size"])
        return
    yield f"{prefix}.gate.weight", (config["n_routed_experts"], hidden)
    if config["model_type"] == "deepseek_v3":
        yield f"{prefix}.gate.e_score_correction_bias", (config["n_routed_experts"],)
    yield from feed_forward_shapes(f"{prefix}.shared_experts", hidden, config["n_shared_experts"] * inner)
    for expert in range(config["n_routed_experts"]):
        yield from feed_forward_shapes(f"{prefix}.experts.{expert}", hidden, inner)


def gpt_oss_shapes(prefix: str, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    experts, hidden, inner = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    yield f"{prefix}.router.weight", (experts, hidden)
    yield f"{prefix}.router.bias", (experts,)
    for matrix, outputs, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
        yield f"{prefix}.experts.{matrix}_bias", (experts, outputs)
        if "quantization_config" in config:
            yield f"{prefix}.experts.{matrix}_blocks", (experts, outputs, inputs // 32, 16)
            yield f"{prefix}.experts.{matrix}_scales", (experts, outputs, inputs // 32)
        else:
            yield f"{prefix}.experts.{matrix}", (experts, inputs, outputs)


def feed_forward_shapes(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.down_proj.weight", (hidden, inner)
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    """Normal weights of standard deviation 1 / sqrt(inputs), biases of 1/4, norms around 1.

    One tensor is in memory at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        packed = name.endswith(("_blocks", "_scales"))
        nbytes = prod(shape) * (1 if packed else ITEM_SIZES[dtype])
        header[name] = {
            "dtype": "U8" if packed else SAFETENSORS_NAMES[dtype],
            "shape": shape,
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            if name.endswith(("_blocks", "_scales")):  # any 4-bit numbers; scales of 2 ** -6 to 2 ** -3
                lowest, highest = (121, 125) if name.endswith("_scales") else (0, 256)
                file.write(random.integers(lowest, highest, shape, dtype=np.uint8).tobytes())
                continue
            values = random.standard_normal(shape, dtype=np.float32)
            if name.endswith("bias"):
                values /= 4
            elif len(shape) == 1:
                values = 1 + values / 10
            else:
                values /= np.sqrt(np.float32(shape[1]))
            file.write(stored(values, dtype).tobytes())


def stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 values as a checkpoint stores them; bfloat16 (cut off, not rounded) as uint16."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def write_byte_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_OF_TEXT: 0} | {character: number for number, character in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
