"""A conversation as the text that a model was trained to continue: the Jinja template in its folder.

Templates come with the checkpoint and are code of others: they run in jinja2's sandbox. jinja2 is imported with the
first template; it belongs to the extra `server`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Self

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.config_file import ConfigFile
from hotset.runtime.model.errors import ModelError

Message = Mapping[str, Any]
"""{"role": ..., "content": ...} and whatever else the model's template knows (tool_calls, thinking, ...)."""

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
        try:
            return self._template.render(
                messages=[_plain(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except (self._error, TypeError) as error:
            raise ChatTemplateError(f"the chat template in {self.path} refuses the conversation: {error}") from error


def _plain(message: Message) -> Message:
    """OpenAI's lists of content parts become their text, as templates want it."""
    if "role" not in message:
        raise ChatTemplateError(f"the message {dict(message)!r} has no role")
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts: list[Any] = content  # pyright: ignore[reportUnknownVariableType]
    kinds = {part.get("type") for part in parts}
    if kinds - {"text"}:
        raise ChatTemplateError(f"a message has content of the types {sorted(map(str, kinds))}, expected only text")
    return {**message, "content": "\n".join(part["text"] for part in parts)}


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Not jinja2's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)
