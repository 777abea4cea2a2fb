"""Reading config.json: what is taken from it, and what is refused before any weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from model_factory import MXFP4, make_model

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from hotset.shm.kv_page_format import KvFormat


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; ... removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", num_heads=4, num_kv_heads=2)


def test_sizes_come_from_the_file(folder: Path) -> None:
    config = ModelConfig.load(folder)
    assert config.family.architecture == "OlmoeForCausalLM"
    assert (config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim) == (32, 4, 2, 8)
    assert (config.num_experts, config.experts_per_token, config.normalize_top_k) == (8, 2, False)
    assert config.eos_token_ids == (0,)
    assert config.clip_qkv is None
    assert config.dtype == "bfloat16"


def test_rope_parameters_of_transformers_5(folder: Path) -> None:
    edit_config(folder, rope_theta=..., rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert ModelConfig.load(folder).rope.theta == 5e5


def test_rope_theta_of_transformers_4(folder: Path) -> None:
    edit_config(folder, rope_theta=25000, rope_scaling=None)
    assert ModelConfig.load(folder).rope.theta == 25000.0


def test_dtype_under_its_newer_name(folder: Path) -> None:
    edit_config(folder, torch_dtype=..., dtype="float16")
    assert ModelConfig.load(folder).dtype == "float16"


def test_key_value_heads_default_to_all_heads(folder: Path) -> None:
    edit_config(folder, num_key_value_heads=...)
    assert ModelConfig.load(folder).num_kv_heads == 4


def test_the_size_of_a_head_may_be_given_apart(tmp_path: Path) -> None:
    config = ModelConfig.load(make_model(tmp_path / "model", family="qwen3_moe", head_dim=20))
    assert (config.hidden_size, config.num_heads, config.head_dim) == (32, 4, 20)


@pytest.mark.parametrize(
    ("changes", "dense"),
    [({"mlp_only_layers": [0, 2]}, {0, 2}), ({"decoder_sparse_step": 2}, {0, 2}), ({"mlp_only_layers": None}, set())],
)
def test_layers_without_experts(tmp_path: Path, changes: dict[str, Any], dense: set[int]) -> None:
    config = ModelConfig.load(make_model(tmp_path / "model", family="qwen3_moe", num_layers=4))
    assert config.dense_layers == frozenset()
    edit_config(tmp_path / "model", **changes)
    config = ModelConfig.load(tmp_path / "model")
    assert config.dense_layers == dense
    assert config.num_experts_in_all == (4 - len(dense)) * 8


def test_windows_of_layers(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family="qwen2_moe", sliding_window=9, use_sliding_window=False)
    assert ModelConfig.load(folder).windows == (0, 0)
    edit_config(folder, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"])
    assert ModelConfig.load(folder).windows == (0, 9)
    edit_config(folder, layer_types=["full_attention"])
    with pytest.raises(CorruptCheckpoint, match="layer_types names 1 of 2 layers"):
        ModelConfig.load(folder)
    edit_config(folder, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(UnsupportedModel, match="layer_types is 'chunked_attention'"):
        ModelConfig.load(folder)


def test_gpt_oss_sees_a_window_in_every_second_layer_unless_told_otherwise(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family="gpt_oss", layer_types=None, num_layers=3)
    assert ModelConfig.load(folder).windows == (20, 0, 20)


def test_packed_experts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family="gpt_oss", intermediate_size=32, quantization_config=MXFP4)
    assert ModelConfig.load(folder).mxfp4_experts
    edit_config(folder, hidden_size=48)
    with pytest.raises(CorruptCheckpoint, match="hidden_size is 48, expected a multiple of 32"):
        ModelConfig.load(folder)
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModel, match="quantization_config is 'gptq'; hotset supports only none or mxfp4"):
        ModelConfig.load(folder)


def test_end_of_text_ids_of_the_generation_config_are_added(folder: Path) -> None:
    edit_config(folder, eos_token_id=[5, 3])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert ModelConfig.load(folder).eos_token_ids == (3, 5, 7)


def test_gpt_oss_ends_at_a_tool_call_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family="gpt_oss", eos_token_id=2)
    names = {2: "<|return|>", 3: "<|message|>", 12: "<|call|>"}
    decoder = {str(id): {"content": name, "special": True} for id, name in names.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert ModelConfig.load(folder).eos_token_ids == (2, 12)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 11]}))
    assert ModelConfig.load(folder).eos_token_ids == (2, 11, 12)


def test_deepseek_v2(tmp_path: Path) -> None:
    config = ModelConfig.load(make_model(tmp_path / "model", family="deepseek_v2", num_layers=3))
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim) == (4, 1, 28, 8)
    assert config.latent is not None and config.latent.query_rank == 0
    assert config.attention_scale == pytest.approx(20**-0.5)
    assert (config.num_experts, config.expert_groups, config.weight_scale) == (8, 1, 1.0)
    assert (config.dense_layers, config.shared_intermediate_size) == ({0}, 2 * 24)
    assert config.kv_nbytes_per_token(KvFormat.FLOAT16) == 3 * 28 * 2
    assert config.rope_interleaved


def test_the_published_config_of_deepseek_v2_lite(tmp_path: Path) -> None:
    published = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 102400,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = ModelConfig.load(tmp_path)
    assert (config.num_experts_in_all, config.shared_intermediate_size) == (26 * 64, 2816)
    assert config.kv_nbytes_per_token(KvFormat.FLOAT32) == 27 * 576 * 4
    assert config.attention_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


def test_deepseek_v3(tmp_path: Path) -> None:
    yarn = {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
    folder = make_model(tmp_path / "model", family="deepseek_v3", rope_scaling=yarn, rope_interleave=False)
    config = ModelConfig.load(folder)
    assert config.latent is not None and config.latent.query_rank == 24
    assert config.attention_scale == pytest.approx(12**-0.5 * (0.07 * math.log(40) + 1) ** 2)
    assert config.rope.magnitude == pytest.approx((0.1 * math.log(40) + 1) / (0.07 * math.log(40) + 1))
    assert (config.expert_groups, config.top_expert_groups, config.weight_scale) == (4, 2, 2.5)
    assert config.normalize_top_k and not config.rope_interleaved
    edit_config(folder, routed_scaling_factor=..., norm_topk_prob=..., topk_method=..., scoring_func=...)
    assert ModelConfig.load(folder) == config


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("deepseek_v2", "topk_method", "noaux_tc"),
        ("deepseek_v2", "scoring_func", "sigmoid"),
        ("deepseek_v2", "norm_topk_prob", True),
        ("deepseek_v2", "moe_layer_freq", 2),
        ("deepseek_v2", "rope_interleave", False),
        ("deepseek_v2", "mlp_bias", True),
        ("deepseek_v2", "num_key_value_heads", 2),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "first_k_dense_replace", 2),
        ("deepseek_v3", "quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ],
)
def test_what_is_not_known_of_deepseek_is_refused_by_name(
    tmp_path: Path, family: str, option: str, value: object
) -> None:
    folder = make_model(tmp_path / "model", family=family)
    edit_config(folder, **{option: value})
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match=option) as caught:
        ModelConfig.load(folder)
    assert caught.value.option == option


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_group", 3),
        ("n_group", ...),
        ("topk_group", 5),
        ("topk_group", 1),
        ("kv_lora_rank", ...),
        ("kv_lora_rank", 1024),
        ("qk_rope_head_dim", 3),
        ("n_shared_experts", ...),
        ("first_k_dense_replace", -1),
    ],
)
def test_sizes_of_deepseek_that_make_no_sense_are_named(tmp_path: Path, option: str, value: object) -> None:
    folder = make_model(tmp_path / "model", family="deepseek_v3", num_experts=8, experts_per_token=3)
    edit_config(folder, **{option: value})
    with pytest.raises(CorruptCheckpoint, match=option):
        ModelConfig.load(folder)


def test_no_end_of_text(folder: Path) -> None:
    edit_config(folder, eos_token_id=None)
    assert ModelConfig.load(folder).eos_token_ids == ()


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("LlamaForCausalLM", {"architectures": ["LlamaForCausalLM"]}),
        ("DeepseekV32ForCausalLM", {"architectures": ["DeepseekV32ForCausalLM"]}),
        ("mamba", {"architectures": ..., "model_type": "mamba"}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("qkv_bias", {"qkv_bias": True}),
        ("mlp_bias", {"mlp_bias": True}),
        ("num_experts", {"num_experts": 1025}),
        ("num_experts_per_tok", {"num_experts": 64, "num_experts_per_tok": 33}),
        ("rope_scaling", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
        ("rope_scaling", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
        ("sliding_window", {"sliding_window": 128}),
        ("quantization_config", {"quantization_config": {"bits": 4}}),
        ("quantization_config", {"quantization_config": MXFP4}),
        ("swiglu_alpha", {"swiglu_alpha": 1.0}),
        ("mlp_only_layers", {"mlp_only_layers": [0, 1]}),
        ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
        ("dtype", {"torch_dtype": "float8_e4m3fn"}),
    ],
)
def test_unsupported_is_refused_by_name_without_reading_weights(
    folder: Path, option: str, changes: dict[str, Any]
) -> None:
    edit_config(folder, **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.load(folder)
    assert caught.value.option == option
    assert option in str(caught.value)


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("num_experts", {"num_experts": ...}),
        ("num_experts", {"num_experts": "many"}),
        ("hidden_size", {"hidden_size": -8}),
        ("hidden_size", {"hidden_size": 30}),
        ("vocab_size", {"vocab_size": True}),
        ("key-value heads", {"num_key_value_heads": 3}),
        ("num_experts_per_tok", {"num_experts_per_tok": 9}),
        ("norm_topk_prob", {"norm_topk_prob": 1}),
        ("rope_theta", {"rope_theta": 0}),
        ("eos_token_id", {"eos_token_id": "end"}),
        ("rope_parameters", {"rope_parameters": [1]}),
    ],
)
def test_values_that_make_no_sense_are_named(folder: Path, word: str, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CorruptCheckpoint, match=word) as caught:
        ModelConfig.load(folder)
    assert caught.value.path == folder / "config.json"


def test_a_file_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CorruptCheckpoint, match="JSON"):
        ModelConfig.load(folder)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        ModelConfig.load(tmp_path / "nowhere")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelNotFound, match=r"weights\.bin is a file, expected a model folder"):
        ModelConfig.load(tmp_path / "weights.bin")
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        ModelConfig.load(tmp_path)
