"""Conversations as text: where templates come from, what they may use, and what is refused."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from model_factory import write_byte_tokenizer

from hotset.runtime.model.chat_template import ChatTemplate, ChatTemplateError, NoChatTemplate

# As Qwen's: roles between markers, tools as JSON, blocks on lines of their own.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'note' %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# As Mixtral's: turns must alternate.
INSTRUCT = """\
{{ bos_token }}
{% for message in messages %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('turns must alternate') }}
    {% endif %}
    {{ '[INST] ' + message.content + ' [/INST]' if message.role == 'user' else message.content + eos_token }}
{% endfor %}
"""
TALK = [
    {"role": "system", "content": "Be short: ä < b."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"of": "<tag>"}}}]


def write_template(folder: Path, source: Any, **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "chat_template": source}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | options))
    return folder


def test_markers_and_the_beginning_of_the_answer(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_template(tmp_path, CHATML))
    talk = [{"role": "user", "content": "Hi"}, {"role": "note", "content": "skipped"}]
    assert template.render(talk) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(talk, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"
    assert template.render(talk, enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")


def test_special_tokens_have_their_names(tmp_path: Path) -> None:
    text = ChatTemplate.load(write_template(tmp_path, INSTRUCT)).render(TALK[1:])
    assert "".join(text.split()) == "<s>[INST]Hi[/INST]Hello.</s>[INST]Bye[/INST]"


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    folder = write_template(tmp_path, "old")
    (folder / "chat_template.jinja").write_text("new {{ eos_token }}")
    assert ChatTemplate.load(folder).render(TALK) == "new </s>"


def test_the_default_of_several(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert ChatTemplate.load(write_template(tmp_path, named)).render(TALK) == "plain"


def test_content_in_parts_is_joined_and_other_than_text_is_refused(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_template(tmp_path, CHATML))
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert "user\none\ntwo<|im_end|>" in template.render([{"role": "user", "content": parts}])
    with pytest.raises(ChatTemplateError, match="image_url"):
        template.render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


ANY = "{% for message in messages %}{{ message | tojson }};{% endfor %}{{ tools }}"
"""Takes everything."""
CALL = {"type": "function", "function": {"name": "size", "arguments": {"of": "tag"}}}


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ("Hi", "a message is 'Hi', expected a dict with 'role' and 'content'"),
        (None, "a message is None, expected a dict with 'role' and 'content'"),
        ({}, "the message {} has no role, expected text such as 'user'"),
        ({"content": "Hi"}, "the message {'content': 'Hi'} has no role, expected text such as 'user'"),
        ({"role": 5, "content": "Hi"}, "the role of a message is 5, expected text such as 'user'"),
        ({"role": "user"}, "the message {'role': 'user'} has no content, expected text"),
        (
            {"role": "user", "content": None},
            "the message {'role': 'user', 'content': None} has no content, expected text",
        ),
        ({"role": "tool", "tool_call_id": "1"}, "has no content, expected text"),
        ({"role": "assistant", "tool_calls": []}, "has no content, expected text"),
        ({"role": "user", "content": 5}, "the content of a message is 5, expected text or a list of parts"),
        ({"role": "user", "content": {"text": "Hi"}}, "is {'text': 'Hi'}, expected text or a list of parts"),
        ({"role": "user", "content": ["Hi"]}, "a part of a message is 'Hi', expected {'type': 'text', 'text': ...}"),
        ({"role": "user", "content": [{"type": "text"}]}, "a part of a message is {'type': 'text'}, expected"),
        (
            {"role": "user", "content": [{"type": "text", "text": 5}]},
            "a part of a message is {'type': 'text', 'text': 5}",
        ),
    ],
)
def test_what_is_no_message_is_refused(tmp_path: Path, message: Any, sentence: str) -> None:
    template = ChatTemplate.load(write_template(tmp_path, ANY))
    with pytest.raises(ChatTemplateError) as caught:
        template.render([{"role": "user", "content": "Hi"}, message])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "thinking": "..."},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": {"size": 5}},
        {"role": "tool", "content": [1, 2]},
        {"role": "ipython", "content": 5},
        {"role": "developer", "content": "Be short."},
    ],
)
def test_what_a_template_may_take_is_handed_on_as_it_is(tmp_path: Path, message: dict[str, Any]) -> None:
    assert ChatTemplate.load(write_template(tmp_path, ANY)).render([message]) == f"{json.dumps(message)};None"


@pytest.mark.parametrize("messages", [[], "Hi", None, {"role": "user", "content": "Hi"}])
def test_a_conversation_is_several_messages(tmp_path: Path, messages: Any) -> None:
    template = ChatTemplate.load(write_template(tmp_path, ANY))
    with pytest.raises(
        ChatTemplateError, match=r"messages is .*, expected dicts with 'role' and 'content', at least one"
    ):
        template.render(messages)


@pytest.mark.parametrize("tools", ["size", TOOLS[0], [test_the_default_of_several], 5])
def test_tools_are_descriptions(tmp_path: Path, tools: Any) -> None:
    template = ChatTemplate.load(write_template(tmp_path, ANY))
    with pytest.raises(ChatTemplateError, match=r"tools is .*, expected a list of dicts that describe functions"):
        template.render(TALK, tools=tools)
    assert template.render(TALK, tools=[]).endswith("[]")


def test_the_date(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_template(tmp_path, "{{ strftime_now('%Y') }}"))
    assert abs(int(template.render(TALK)) - datetime.now().year) <= 1


def test_what_the_template_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_template(tmp_path, INSTRUCT))
    with pytest.raises(ChatTemplateError, match="turns must alternate"):
        template.render(TALK)
    with pytest.raises(ChatTemplateError, match="has no role"):
        template.render([{"content": "Hi"}])


def test_a_template_that_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match=r"tokenizer_config\.json is not valid"):
        ChatTemplate.load(write_template(tmp_path, "{% for %}"))


def test_templates_reach_nothing_outside(tmp_path: Path) -> None:
    template = ChatTemplate.load(write_template(tmp_path, "{{ messages.__class__.__mro__ }}"))
    with pytest.raises(ChatTemplateError, match="unsafe"):
        template.render(TALK)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(NoChatTemplate, match="has no chat template"):
        ChatTemplate.load(tmp_path)


def test_without_jinja2_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_template(tmp_path, CHATML)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(NoChatTemplate, match=r"\[server\]"):
        ChatTemplate.load(folder)


@pytest.mark.parametrize(
    ("source", "talk", "options"),
    [
        (CHATML, TALK, {}),
        (CHATML, TALK, {"tools": TOOLS, "enable_thinking": False}),
        (CHATML, TALK, {"add_generation_prompt": False}),
        (INSTRUCT, TALK[1:], {}),
    ],
)
def test_the_text_is_that_of_transformers(tmp_path: Path, source: str, talk: Any, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: reference)")
    write_byte_tokenizer(write_template(tmp_path, source, eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast"))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(talk, tokenize=False, **{"add_generation_prompt": True, **options})
    assert ChatTemplate.load(tmp_path).render(talk, **options) == expected
