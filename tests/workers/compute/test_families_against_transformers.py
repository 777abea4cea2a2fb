"""Every family on a checkpoint that transformers itself has made and saved; skipped where torch is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import CLEAR_SHARE, prompts, short_prompts
from in_process_model import InProcessModel

from hotset.runtime.model.checkpoint import Checkpoint

torch = pytest.importorskip("torch", reason="torch is not installed (extra: reference)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: reference)")

NUM_EXPERTS = 8
SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    "first_k_dense_replace": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 32, "num_experts": NUM_EXPERTS},
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": NUM_EXPERTS,
        "head_dim": 24,
        "sliding_window": 30,
        "swiglu_limit": 1.5,
    },
    "mixtral": {"intermediate_size": 32, "num_local_experts": NUM_EXPERTS, "sliding_window": 30},
    "qwen2_moe": {
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "shared_expert_intermediate_size": 80,
        "num_experts": NUM_EXPERTS,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 32,
        "intermediate_size": 96,
        "num_experts": NUM_EXPERTS,
        "head_dim": 24,
        "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        **LATENT_ATTENTION,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "deepseek_v3": {
        **LATENT_ATTENTION,
        "q_lora_rank": 32,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
    },
}


def make_checkpoint(folder: Path, model_type: str, dtype: Any, **options: Any) -> Path:
    """Random weights of a size at which every part of the model matters; norms around 1."""
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **MODELS[model_type], **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, scale)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def logits_of(folder: Path, dtype: Any, token_ids: np.ndarray) -> np.ndarray:
    """[prompts, tokens, vocab_size] for token ids [prompts, tokens]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(token_ids, dtype=torch.long)).logits.float().numpy()


def expected_logits(folder: Path, dtype: Any) -> np.ndarray:
    return np.concatenate([logits_of(folder, dtype, ids[None])[0] for ids in prompts()])


def our_logits(folder: Path) -> np.ndarray:
    model = InProcessModel(folder)
    return np.concatenate([model.logits(token_ids) for token_ids in prompts()])


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_logits_computed_in_float32(model_type: str, stored: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type, getattr(torch, stored))
    assert np.abs(our_logits(folder) - expected_logits(folder, torch.float32)).max() <= 2e-3


@pytest.mark.parametrize("model_type", MODELS)
def test_experts_stacked_as_transformers_keeps_them(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type, torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("gate_up_proj") for name in Checkpoint.open(tmp_path / "stacked").tensors)
    np.testing.assert_array_equal(our_logits(tmp_path / "stacked"), our_logits(folder))


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_computed_in_bfloat16(model_type: str, tmp_path: Path) -> None:
    """transformers rounds every intermediate result to 8 bits, we none. That would decide close choices of the gate,
    and another choice is another computation: so here every expert is chosen, and only their weights differ."""
    every = {"num_experts_per_tok": NUM_EXPERTS} | ({"topk_group": 4} if model_type == "deepseek_v3" else {})
    folder = make_checkpoint(tmp_path / "model", model_type, torch.bfloat16, **every)
    expected = expected_logits(folder, torch.bfloat16)
    difference = np.linalg.norm(our_logits(folder) - expected, axis=1)
    assert (difference / np.linalg.norm(expected, axis=1)).max() <= 5e-2


@pytest.mark.parametrize("model_type", MODELS)
def test_logits_computed_in_bfloat16_behind_choices_that_are_not_close(model_type: str, tmp_path: Path) -> None:
    """A real top-k. Where the choices up to a position are clear, they have to be the same, and the rest to agree."""
    folder = make_checkpoint(tmp_path / "model", model_type, torch.bfloat16)
    expected = logits_of(folder, torch.bfloat16, short_prompts())
    model = InProcessModel(folder)
    logits, clear = map(np.stack, zip(*[model.clear_choices(ids, CLEAR_SHARE) for ids in short_prompts()], strict=True))
    assert clear.sum() >= 100, "hardly any position is compared"
    assert clear[:, 1:].sum() >= 30, "hardly any position with others before it is compared"
    difference = np.linalg.norm(logits - expected, axis=2) / np.linalg.norm(expected, axis=2)
    assert difference[clear].max() <= 5e-2
