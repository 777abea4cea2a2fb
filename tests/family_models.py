"""Small models of every family, for the tests that compare with transformers, live or recorded.

`scripts/record_family_logits.py` records what transformers computes for them; so that the recording stays true, a
change here or in model_factory.py needs a new one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from model_factory import MXFP4, make_model
from numpy.typing import NDArray

NUM_POSITIONS = 72
NUM_PROMPTS = 3
VOCAB_SIZE = 260
RECORDING = Path(__file__).parent / "data" / "family_logits.npz"

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK_YARN = {**YARN, "type": "yarn", "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# By the name of the test. Every feature of a family is in one of its models.
FAMILY_MODELS: dict[str, dict[str, Any]] = {
    "olmoe with biases": {"family": "olmoe", "attention_bias": True},
    "gpt_oss": {"family": "gpt_oss", "num_kv_heads": 2},
    "gpt_oss in mxfp4": {
        "family": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 32,
        "experts_per_token": 4,
        "quantization_config": MXFP4,
        "dtype": "bfloat16",
    },
    "mixtral": {"family": "mixtral", "num_kv_heads": 2},
    "mixtral with a window": {"family": "mixtral", "sliding_window": 20, "experts_per_token": 1},
    "qwen2_moe with windows in some layers": {
        "family": "qwen2_moe",
        "num_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen3_moe with a window": {"family": "qwen3_moe", "use_sliding_window": True, "sliding_window": 17},
    "qwen2_moe": {"family": "qwen2_moe", "num_kv_heads": 2},
    "qwen2_moe without biases": {
        "family": "qwen2_moe",
        "num_layers": 3,
        "qkv_bias": False,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {"family": "qwen3_moe", "num_kv_heads": 2, "experts_per_token": 3},
    "qwen3_moe with layers without experts": {
        "family": "qwen3_moe",
        "num_layers": 3,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
    "qwen3_moe with every second layer": {"family": "qwen3_moe", "num_layers": 4, "decoder_sparse_step": 2},
    "qwen3_moe with yarn": {"family": "qwen3_moe", "rope_scaling": YARN},
    "qwen3_moe with linear rope": {"family": "qwen3_moe", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "qwen3_moe with llama3 rope": {"family": "qwen3_moe", "rope_scaling": LLAMA3},
    "deepseek_v2 as V2-Lite": {
        "family": "deepseek_v2",
        "num_layers": 3,
        "experts_per_token": 3,
        "rope_scaling": DEEPSEEK_YARN,
    },
    "deepseek_v2 with groups": {
        "family": "deepseek_v2",
        "num_layers": 3,
        "q_lora_rank": 24,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "experts_per_token": 3,
        "routed_scaling_factor": 3.0,
        "n_shared_experts": 1,
        "attention_bias": True,
    },
    "deepseek_v3": {
        "family": "deepseek_v3",
        "num_layers": 3,
        "experts_per_token": 3,
        "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    },
    "deepseek_v3 without groups": {
        "family": "deepseek_v3",
        "num_layers": 3,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "first_k_dense_replace": 2,
        "norm_topk_prob": False,
        "rope_interleave": False,
        "tie_word_embeddings": True,
    },
}

# One of each family, and MXFP4: those whose logits are recorded in bfloat16 too.
BF16_MODELS = (
    "olmoe with biases",
    "gpt_oss",
    "gpt_oss in mxfp4",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2 as V2-Lite",
    "deepseek_v3",
)
# Rounded to 8 bits, logits of the gate differ by up to about a 32nd of the largest from ours; choices are compared that
# are clearer than twice that.
CLEAR_SHARE = 1 / 16


def make_family_model(folder: Path, name: str, dtype: str = "float32") -> Path:
    return make_model(folder, vocab_size=VOCAB_SIZE, tokenizer=True, **{"dtype": dtype, **FAMILY_MODELS[name]})


def prompts() -> list[NDArray[np.int32]]:
    random = np.random.default_rng(7)
    return [random.integers(1, VOCAB_SIZE, NUM_POSITIONS).astype(np.int32) for _ in range(NUM_PROMPTS)]


def recorded_columns() -> NDArray[np.int64]:
    """The part of the vocabulary that is recorded, which keeps the file small."""
    return np.arange(0, VOCAB_SIZE, 13)


def weights_digest(folder: Path) -> str:
    """Tells a change of the random weights (by us, or by numpy) from a wrong computation."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def short_prompts() -> NDArray[np.int32]:
    """[prompts, tokens]. For the comparison in bfloat16: the shorter, the more have no close choice in front."""
    return np.random.default_rng(11).integers(1, VOCAB_SIZE, (256, 4)).astype(np.int32)
