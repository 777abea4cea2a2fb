"""A wrong argument of a method is one sentence, and the instance goes on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from instances import PROMPTS

from hotset.runtime import Backend, BackendError, BudgetTooSmall, MemoryTooSmall, SamplingParams

SHORT = SamplingParams(max_tokens=2)


@pytest.mark.parametrize("model", [3, 1.5, b"x", [1], True, ""])
def test_a_model_is_a_path(model: Any) -> None:
    with pytest.raises(ValueError, match=r"model is .*, expected the path of a checkpoint folder or a GGUF file"):
        Backend(model)


@pytest.mark.parametrize(
    "prompt", [5, None, 1.5, b"x", [], {"a": 1}, {1, 2}, iter([1]), [1.5], [None], np.zeros(3), "\ud800", ["\ud800"]]
)
def test_a_prompt_is_text_or_token_ids(backend: Backend, prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"the prompt is .*, expected text"):
        backend.generate(prompt, SHORT)
    if not isinstance(prompt, list):
        with pytest.raises(ValueError, match=r"the prompt is .*, expected text"):
            backend.stream(prompt, SHORT)


@pytest.mark.parametrize("params", [3, "x", {"max_tokens": 3}, SamplingParams])
def test_parameters_are_SamplingParams(backend: Backend, params: Any) -> None:
    for ask in (backend.generate, backend.stream):
        with pytest.raises(ValueError, match=r"params is .*, expected SamplingParams\(...\) or None"):
            ask(PROMPTS[0], params)
    with pytest.raises(ValueError, match="params is"):
        backend.generate(PROMPTS, params)


def test_sampling_options_go_into_SamplingParams(backend: Backend) -> None:
    ask: Any
    for ask, name in ((backend.generate, "generate"), (backend.stream, "stream"), (backend.chat, "chat")):
        with pytest.raises(ValueError) as caught:
            ask(PROMPTS[0], max_tokens=5, temperature=0)
        assert str(caught.value) == (
            f"Backend.{name} is given max_tokens=5, temperature=0, "
            "expected params=SamplingParams(max_tokens=5, temperature=0)"
        )
    ask = backend.generate
    for call, sentence in (
        (lambda: ask(PROMPTS[0], max_new_tokens=5), "is given max_new_tokens=5, expected prompts, params"),
        (lambda: ask(PROMPTS[0], n=2), r"is given n=2 \(which hotset does not have\), expected prompts, params"),
        (lambda: ask(), "is given no prompts, expected prompts, params"),
        (lambda: ask("x", SHORT, 5), "too many positional arguments, expected prompts, params"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert backend.generate(PROMPTS[0], params=SHORT).token_ids


def test_a_setting_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"^Backend is given max_tokens=5, expected model, workers, memory, .*, name$"):
        Backend(max_tokens=5)


@pytest.mark.parametrize("messages", [5, None, "hi", []])
def test_a_conversation_is_a_list_of_messages(backend: Backend, messages: Any) -> None:
    with pytest.raises(ValueError, match=r"messages is .*, expected dicts with 'role' and 'content'"):
        backend.chat(messages)


@pytest.mark.parametrize("variables", [5, "enable_thinking", [1], {1: True}])
def test_the_variables_of_a_template_have_names(backend: Backend, variables: Any) -> None:
    with pytest.raises(ValueError, match=r"chat_template_kwargs is .*, expected a dict from texts to anything or None"):
        backend.chat([{"role": "user", "content": "Hi"}], chat_template_kwargs=variables)


@pytest.mark.parametrize("max_moves", ["x", -1, 1.5, math.nan, True])
def test_a_number_of_moves_is_one(backend: Backend, max_moves: Any) -> None:
    with pytest.raises(ValueError, match=r"max_moves is .*, expected an integer of at least 0"):
        backend.defragment(max_moves)
    assert backend.defragment(0) == 0
    assert backend.defragment(10**30) >= 0


def test_a_closed_backend_says_so() -> None:
    backend = Backend(workers=1)
    backend.close()
    for use in (
        lambda: backend.generate("x"),
        lambda: backend.stream("x"),
        backend.stats,
        backend.reset_stats,
        backend.defragment,
        backend.check_cache,
        lambda: backend.pin_experts(0, [0]),
        backend.__enter__,
    ):
        with pytest.raises(BackendError, match="the backend is closed"):
            use()


def test_what_needs_so_many_experts_is_named() -> None:
    with pytest.raises(BudgetTooSmall, match="user_pins=1000000 and read_lanes=1; give a larger budget"):
        Backend(user_pins=10**6)
    with pytest.raises(MemoryTooSmall, match=r"memory is 20MiB, expected at least \d+MiB .* user_pins=0"):
        Backend(memory="20MiB")
    with pytest.raises(ValueError, match="kv_cache_memory is 1000000000000000, expected fewer than"):
        Backend(kv_cache_memory=10**15)
