"""Whole instances with small models of other families than the one that ships."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_models import FAMILY_MODELS, make_family_model, prompts
from in_process_model import InProcessModel

from hotset.runtime import Backend, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, routing="off", ignore_eos=True)


@pytest.mark.parametrize(
    "name",
    ["gpt_oss", "gpt_oss in mxfp4", "mixtral with a window", "qwen2_moe", "qwen3_moe with layers without experts"],
)
def test_one_and_two_workers_give_the_text_of_the_model(name: str, tmp_path: Path) -> None:
    assert name in FAMILY_MODELS
    folder = make_family_model(tmp_path / "model", name, dtype="bfloat16")
    expected = [InProcessModel(folder).greedy(ids, GREEDY.max_tokens) for ids in prompts()]
    for workers in (1, 2):
        with Backend(folder, workers=workers, expert_budget="75%") as backend:
            answers = [backend.generate(ids, GREEDY) for ids in prompts()]
            assert [answer.token_ids for answer in answers] == expected
            assert backend.check_cache() is None
