"""A conversation as the text that a model was trained to continue: the Jinja template in its folder.

Templates come with the checkpoint and are code of others: they run in jinja2's sandbox. jinja2 is imported with the
first template; it belongs to the extra `server`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self, cast

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.config_file import ConfigFile
from hotset.runtime.model.errors import ModelError

Message = Mapping[str, Any]
"""{"role": ..., "content": ...} and whatever else the model's template knows (tool_calls, thinking, ...)."""

_ABOUT: Final = ("role", "content", "name", "tool_call_id")
"""What says of a message whose it is, and is no content."""
_TOOLS: Final = ("tool", "ipython", "function")
"""The roles in which tools answer."""
_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class NoChatTemplate(ModelError):
    """The model folder has no chat template, or jinja2 is not installed."""


class ChatTemplateError(HotsetError, ValueError):
    """The template cannot be compiled, or it refuses the conversation; the message is what it says."""


class ChatTemplate:
    """`source`: Jinja. `special_tokens`: bos_token, eos_token and so on, which templates use by these names."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], path: Path) -> None:
        try:
            import jinja2
            import jinja2.ext
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise NoChatTemplate(path, "Chat templates need jinja2: install hotset with the extra [server].") from None

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # As transformers sets it up, for which the templates are written.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        functions: dict[str, Any] = {"raise_exception": refuse, "strftime_now": _strftime_now}
        environment.globals.update(functions)
        self._special_tokens = dict(special_tokens)
        self._error = jinja2.TemplateError
        self.path = path
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template in {path} is not valid: {error}") from error

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """From chat_template.jinja, else from tokenizer_config.json. Raises `NoChatTemplate`."""
        folder = Path(folder)
        path, apart = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        tokenizer = ConfigFile.read_if_there(path)
        special_tokens = {name: tokenizer.token(name) for name in _SPECIAL_TOKENS}
        if apart.is_file():
            return cls(apart.read_text(encoding="utf-8"), special_tokens, apart)
        source = tokenizer.get("chat_template")
        if isinstance(source, list):  # several by name
            named: list[Any] = source  # pyright: ignore[reportUnknownVariableType]
            source = next((entry["template"] for entry in named if entry.get("name") == "default"), None)
        if not isinstance(source, str):
            raise NoChatTemplate(folder, f"{folder} has no chat template: this model continues text, it does not chat.")
        return cls(source, special_tokens, path)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation; with `add_generation_prompt` it ends where the assistant's answer begins.

        `variables` are the template's own, such as `enable_thinking` or `reasoning_effort`.
        """
        if tools is not None and not _all_dicts(tools):
            raise ChatTemplateError(f"tools is {tools!r}, expected a list of dicts that describe functions, or None")
        conversation = [_plain(message) for message in checked_messages(messages)]
        try:
            return self._template.render(
                messages=conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except (self._error, TypeError) as error:
            raise ChatTemplateError(f"the chat template in {self.path} refuses the conversation: {error}") from error


def checked_messages(messages: Any) -> Sequence[Any]:
    """What is given for a conversation; raises `ChatTemplateError` if it is not several of anything."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ChatTemplateError(f"messages is {messages!r}, expected dicts with 'role' and 'content', at least one")
    return cast("Sequence[Any]", messages)


def _plain(message: Any) -> Message:
    """Checked, and OpenAI's lists of content parts become their text, as templates want it.

    What a template may take is its own affair: an assistant's message may have tool calls, or thoughts, and no content,
    and what a tool answers may be any value.
    """
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"a message is {message!r}, expected a dict with 'role' and 'content'")
    given = cast("Message", message)
    if "role" not in given:
        raise ChatTemplateError(f"the message {dict(given)!r} has no role, expected text such as 'user'")
    role, content = given["role"], given.get("content")
    if not isinstance(role, str):
        raise ChatTemplateError(f"the role of a message is {role!r}, expected text such as 'user'")
    if content is None:
        if not any(value for name, value in given.items() if name not in _ABOUT):
            raise ChatTemplateError(f"the message {dict(given)!r} has no content, expected text or a list of parts")
    elif isinstance(content, list):
        parts = cast("list[Any]", content)
        if role not in _TOOLS or (_all_dicts(parts) and all("type" in part for part in parts)):
            return {**given, "content": "\n".join(_text(part) for part in parts)}
    elif not isinstance(content, str) and role not in _TOOLS:
        raise ChatTemplateError(f"the content of a message is {content!r}, expected text or a list of parts")
    return given


def _text(part: Any) -> str:
    of = cast("Mapping[str, Any]", part if isinstance(part, Mapping) else {})
    if of.get("type", "text") != "text":
        raise ChatTemplateError(f"a part of a message has the type {of['type']!r}, expected only 'text'")
    if "type" not in of or not isinstance(of.get("text"), str):
        raise ChatTemplateError(f"a part of a message is {part!r}, expected {{'type': 'text', 'text': ...}}")
    return of["text"]


def _all_dicts(given: Any) -> bool:
    return isinstance(given, list | tuple) and all(isinstance(one, Mapping) for one in cast("Sequence[Any]", given))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Not jinja2's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)
