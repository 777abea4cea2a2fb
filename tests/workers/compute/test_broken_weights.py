"""Weights that are no numbers: the request fails in a sentence that names the model and, where it shows, the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_model import InProcessModel
from model_factory import make_model, stored

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.sampling_params import SamplingParams
from hotset.shm.kv_page_format import KvFormat
from hotset.workers.compute.broken_weights import NotANumber
from hotset.workers.compute.sampler import LogitsNotNumbers, sample
from hotset.workers.compute.transformer import UnstorableRow

IDS = np.arange(1, 9, dtype=np.int32)
FAMILIES = {"olmoe": {}, "qwen2_moe": {}, "deepseek_v3": {}, "gpt_oss": {}}


def spoil(folder: Path, name: str, value: float, dtype: str = "bfloat16") -> Path:
    """The middle of the tensor becomes `value`."""
    checkpoint = Checkpoint.open(folder)
    location = checkpoint.tensors[name]
    number = stored(np.array([value], np.float32), dtype).tobytes()
    with location.file.open("r+b") as file:
        file.seek(location.offset + location.nbytes // len(number) // 2 * len(number))
        file.write(number)
    return folder


def reason(folder: Path, **options: Any) -> str:
    model = InProcessModel(folder, **options)
    with pytest.raises(NotANumber) as caught:
        model.logits(IDS)
    assert str(folder) in str(caught.value) and "KV" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kv_format", [KvFormat.FLOAT32, KvFormat.Q8_0])
def test_a_tensor_that_makes_keys_or_values_no_numbers_is_named(
    tmp_path: Path, value: float, kv_format: KvFormat
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    folder = spoil(make_model(tmp_path / "model"), name, value)
    said = reason(folder, kv_format=kv_format)
    assert said.startswith(f"position 0 of the text is no number in layer 1 of the model in {folder}: ")
    assert said.endswith(f": {name} holds values that are not finite")


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("olmoe", "input_layernorm.weight"),
        ("olmoe", "self_attn.k_norm.weight"),
        ("olmoe", "self_attn.o_proj.weight"),
        ("olmoe", "post_attention_layernorm.weight"),
        ("qwen2_moe", "self_attn.k_proj.bias"),
        ("qwen2_moe", "mlp.shared_expert.down_proj.weight"),
        ("deepseek_v3", "self_attn.kv_a_proj_with_mqa.weight"),
        ("deepseek_v3", "self_attn.kv_b_proj.weight"),
        ("deepseek_v3", "mlp.gate_proj.weight"),
        ("gpt_oss", "self_attn.o_proj.bias"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_every_dense_tensor_of_a_layer_is_named(tmp_path: Path, family: str, part: str, layer: int) -> None:
    if family == "deepseek_v3" and "mlp" in part and layer:
        pytest.skip("only its first layer has no experts")
    name = f"model.layers.{layer}.{part}"
    said = reason(spoil(make_model(tmp_path / "model", family=family), name, np.nan))
    assert said.endswith(f": {name} holds values that are not finite")


@pytest.mark.parametrize("layer", [0, 1])
def test_of_an_expert_the_layer_is_named(tmp_path: Path, layer: int) -> None:
    folder = make_model(tmp_path / "model")
    for expert in range(8):
        spoil(folder, f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", np.nan)
    said = reason(folder)
    assert said.endswith(f": an expert of layer {layer} holds values that are not finite, or sums overflow there")
    assert Path(folder).name in said


def test_an_embedding_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    name = "model.embed_tokens.weight"
    with Checkpoint.open(folder).tensors[name].file.open("r+b") as file:
        location = Checkpoint.open(folder).tensors[name]
        file.seek(location.offset + 3 * 32 * 2)
        file.write(stored(np.full(32, np.nan, np.float32), "bfloat16").tobytes())
    said = reason(folder)
    assert said.startswith("position 2 of the text is no number in layer 0")
    assert said.endswith(f": {name} holds values that are not finite")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_what_makes_logits_no_numbers_is_named(tmp_path: Path, name: str) -> None:
    model = InProcessModel(spoil(make_model(tmp_path / "model"), name, np.nan))
    logits = model.logits(IDS)
    with pytest.raises(LogitsNotNumbers, match="the logits of position 8 are not numbers"):
        sample(logits[-1], SamplingParams(), seed=0, position=8, prompt_ids=IDS, generated_ids=IDS[:0])
    assert model.transformer.broken.of_logits().endswith(f"{name} holds values that are not finite")


def test_numbers_that_are_only_too_large_for_the_pages_are_not_blamed_on_weights(tmp_path: Path) -> None:
    folder = spoil(make_model(tmp_path / "model"), "model.layers.1.self_attn.v_proj.weight", 3e6)
    with pytest.raises(UnstorableRow, match=r"layer 1 reach .* which KV pages of float16 cannot hold"):
        InProcessModel(folder, kv_format=KvFormat.FLOAT16).logits(IDS)
