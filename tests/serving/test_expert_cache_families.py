"""Experts of every layout and format come out of the cache as the checkpoint has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family_models import FAMILY_MODELS
from model_factory import make_model

from hotset.runtime import ExpertCache
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.workers.expert_store import read_expert


@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss in mxfp4", "mixtral", "deepseek_v3"])
def test_every_expert_has_its_bytes(name: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", **FAMILY_MODELS[name])
    checkpoint = Checkpoint.open(folder)
    shape = checkpoint.config.hidden_size, checkpoint.config.intermediate_size
    with ExpertCache(folder, expert_budget="60%") as cache:
        for layer, expert in checkpoint.expert_ids:
            with cache.pinned(layer, [expert]) as pinned:
                weights = pinned[expert]
                assert np.array_equal(weights.bytes, read_expert(checkpoint, layer, expert))
                assert sum(part.nbytes for part in weights.values()) == len(weights.bytes)
                assert weights.float32("down").shape == shape


def test_layers_without_experts_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", **FAMILY_MODELS["qwen3_moe with layers without experts"])
    with ExpertCache(folder, expert_budget="60%") as cache:
        with pytest.raises(ValueError, match="layer is 1, expected one of 3 that has experts"):
            cache.pinned(1, [0])
        with cache.pinned(2, [0]) as pinned:
            assert pinned[0].format == "bfloat16"


@pytest.mark.parametrize(("source", "target"), [("MXFP4", "mxfp4_ggml"), ("Q8_0", "q8_0"), ("BF16", "bfloat16")])
def test_a_gguf_file_has_the_values_of_the_model_that_it_was_made_from(
    source: str, target: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    from gguf_factory import write_gguf

    name = "gpt_oss in mxfp4" if source == "MXFP4" else "gpt_oss"
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    folder = make_model(tmp_path / "model", tokenizer=True, **{**FAMILY_MODELS[name], **sizes})
    path = write_gguf(folder, tmp_path / "model.gguf", "BF16" if source == "MXFP4" else source)
    bound = {"MXFP4": 0, "Q8_0": 0.01, "BF16": 2**-8}[source]
    with ExpertCache(folder, expert_budget="60%") as expected, ExpertCache(path, expert_budget="60%") as found:
        for expert in range(found.num_experts):
            with expected.pinned(1, [expert]) as ours, found.pinned(1, [expert]) as theirs:
                assert theirs[expert].format == target
                both = ours[expert].float32("gate_up")
                for part, rows in (("gate", both[0::2]), ("up", both[1::2]), ("down", ours[expert].float32("down"))):
                    assert np.allclose(theirs[expert].float32(part), rows, rtol=bound, atol=bound * np.abs(rows).max())
                bias = ours[expert].float32("gate_up_bias")
                assert np.array_equal(theirs[expert].float32("up_bias"), bias[1::2])
