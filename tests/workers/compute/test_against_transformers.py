"""Logits and greedy text against transformers on the very same folder; skipped where torch is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from in_process_model import InProcessModel
from model_factory import make_model

from hotset.runtime.model.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="torch is not installed (extra: reference)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: reference)")

PROMPTS = [
    "def fibonacci(n):\n    a, b = 0, 1\n    while n > 0:\n        a, b = b, a + b\n",
    "class Reader:\n    def __init__(self, path):\n        self.path = path\n",
    "import os\nimport sys\n\n\ndef main(arguments=None):\n    parser = argparse.ArgumentParser()\n",
]


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def assert_same_logits(folder: Path, token_ids: np.ndarray) -> None:
    with torch.no_grad():
        expected = load(folder)(torch.tensor(token_ids[None], dtype=torch.long)).logits[0].numpy()
    assert np.abs(InProcessModel(folder).logits(token_ids) - expected).max() <= 2e-3


def test_shipped_model_over_256_positions(trained_folder: Path) -> None:
    reference, model, tokenizer = load(trained_folder), InProcessModel(trained_folder), Tokenizer(trained_folder)
    for prompt in PROMPTS:
        token_ids = tokenizer.encode(prompt)
        token_ids = np.resize(token_ids, 256)  # repeated as often as it takes
        with torch.no_grad():
            expected = reference(torch.tensor(token_ids[None], dtype=torch.long)).logits[0].numpy()
        assert np.abs(model.logits(token_ids) - expected).max() <= 2e-3


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "bfloat16", "shards": 3},
        {"dtype": "float16", "num_kv_heads": 2},
        {"norm_topk_prob": True, "experts_per_token": 4},
        {"clip_qkv": 0.5},
        {"tie_word_embeddings": True},
        {"rope_theta": 500000.0},
    ],
    ids=str,
)
def test_random_checkpoints(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = make_model(tmp_path / "model", hidden_size=64, **options)
    assert_same_logits(folder, np.random.default_rng(2).integers(0, 260, 256).astype(np.int32))


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    reference = load(make_model(tmp_path / "first"))
    reference.save_pretrained(tmp_path / "second", max_shard_size="50KB")
    assert_same_logits(tmp_path / "second", np.arange(100, dtype=np.int32))
