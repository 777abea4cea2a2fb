"""Whole instances with small models of other families than the one that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_models import FAMILY_MODELS, make_family_model, prompts
from gguf_factory import write_gguf
from in_process_model import InProcessModel
from model_factory import MXFP4, make_model

from hotset.runtime import Backend, NoChatTemplate, SamplingParams
from hotset.runtime.model.gguf_folder import model_folder

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, routing="off", ignore_eos=True)


@pytest.mark.parametrize(
    "options",
    [{"family": "qwen3_moe", "dtype": "float32"}, {"family": "gpt_oss", "quantization_config": MXFP4}],
    ids=["qwen3_moe", "gpt_oss in mxfp4"],
)
def test_a_gguf_file_is_served_like_a_folder(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "vocab_size": 260}
    folder = make_model(tmp_path / "model", tokenizer=True, **options, **sizes)
    path = write_gguf(folder, tmp_path / "model.gguf", "Q4_0")
    expected = [InProcessModel(model_folder(path)).greedy(ids, GREEDY.max_tokens) for ids in prompts()]
    for workers in (1, 2):
        with Backend(path, workers=workers, expert_budget="75%") as backend:
            assert [backend.generate(ids, GREEDY).token_ids for ids in prompts()] == expected


def test_a_conversation_is_the_text_that_its_template_makes_of_it(tmp_path: Path) -> None:
    folder = make_family_model(tmp_path / "model", "qwen3_moe", dtype="bfloat16")
    with Backend(folder, workers=1) as backend:
        with pytest.raises(NoChatTemplate, match="has no chat template"):
            backend.chat([{"role": "user", "content": "Hi"}])
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}{{ mood }}>"
        )
        hello, bye = [{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Bye"}]
        mood = {"mood": "calm"}
        single = backend.chat(hello, GREEDY, chat_template_kwargs=mood)
        assert single.token_ids == backend.generate("user: Hello;calm>", GREEDY).token_ids
        assert single.prompt_tokens == len("user: Hello;calm>")
        both = backend.chat([hello, bye], GREEDY, chat_template_kwargs=mood)
        assert [answer.token_ids for answer in both] == [
            backend.generate(f"user: {word};calm>", GREEDY).token_ids for word in ("Hello", "Bye")
        ]


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss",
        "gpt_oss in mxfp4",
        "mixtral with a window",
        "qwen2_moe",
        "qwen3_moe with layers without experts",
        "deepseek_v2 as V2-Lite",
        "deepseek_v3",
    ],
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
