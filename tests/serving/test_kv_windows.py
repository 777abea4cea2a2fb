"""Layers that see only a window: their pages come back while a long text grows, and the text stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from family_models import VOCAB_SIZE
from in_process_model import InProcessModel
from model_factory import make_model

from hotset.runtime import Backend, RequestFailed, SamplingParams
from hotset.runtime.kv.layer_groups import pages_of_sequence
from hotset.shm.kv_page_format import KvFormat

LENGTH = 400
PROMPT_LENGTH = 300
BLOCK = 4
STEP = 16  # tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH - PROMPT_LENGTH, routing="off", ignore_eos=True)

# Per model its options, and the windows of its groups of layers.
MODELS = {
    "gpt_oss": ({"family": "gpt_oss", "sliding_window": 20}, (0, 20)),
    "mixtral": ({"family": "mixtral", "sliding_window": 20}, (20,)),
    "qwen2_moe": (
        {
            "family": "qwen2_moe",
            "num_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        (0, 20, 20),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_D5_a_long_text_needs_no_pages_behind_its_windows(name: str, tmp_path: Path) -> None:
    """The arena has just the pages for one sequence: those of its windows, however long it is."""
    options, windows = MODELS[name]
    folder = make_model(
        tmp_path / "model",
        vocab_size=VOCAB_SIZE,
        tokenizer=True,
        dtype="float32",
        max_position_embeddings=2 * LENGTH,
        **options,
    )
    random = np.random.default_rng(3)
    prompts = [random.integers(1, VOCAB_SIZE, PROMPT_LENGTH).astype(np.int32) for _ in range(2)]
    groups = len(windows)
    whole = InProcessModel(folder, num_pages=1 + groups * LENGTH // BLOCK, block_size=BLOCK)
    expected = [whole.greedy(ids, GREEDY.max_tokens) for ids in prompts]

    pages = pages_of_sequence(windows, LENGTH, BLOCK, 2 * STEP)
    assert pages < groups * LENGTH // BLOCK * 2 // 3
    page_nbytes = whole.config.kv_page_layout(BLOCK, KvFormat.FLOAT32).page_nbytes
    sizes = {"block_size": BLOCK, "max_num_batched_tokens": STEP, "max_model_len": 2 * LENGTH}
    with Backend(folder, workers=2, kv_cache_memory=pages * page_nbytes, expert_budget="75%", **sizes) as backend:
        assert [answer.token_ids for answer in backend.generate(prompts, GREEDY)] == expected
        stats = backend.stats()
        assert stats.kv_pages_total == pages
        assert stats.kv_pages_used == 0
        assert backend.check_cache() is None
        if 0 in windows:
            with pytest.raises(RequestFailed, match="needs 700 tokens, but the KV cache holds 400"):
                backend.generate(prompts[0], SamplingParams(max_tokens=LENGTH, ignore_eos=True))
    with Backend(folder, workers=2, expert_budget="75%", **sizes) as backend:  # with pages for a prefix cache as well
        assert [answer.token_ids for answer in backend.generate(prompts, GREEDY)] == expected
        again = backend.generate(prompts[0], GREEDY)
        assert again.token_ids == expected[0]
        assert backend.check_cache() is None
        if 0 in windows:
            assert again.cached_tokens == (PROMPT_LENGTH - 1) // BLOCK * BLOCK
