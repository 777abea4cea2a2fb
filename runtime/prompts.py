"""What a user gives for a prompt, text, token ids or a conversation, as token ids of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import fitting
from hotset.runtime.model.chat_template import ChatTemplate, Message, checked_messages
from hotset.runtime.model.tokenizer import Tokenizer

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]]
TokenIds = npt.NDArray[np.int32]


class Prompts:
    """Of one model. What is no prompt is a `ValueError`.

    Args:
        folder: of the model, with its chat template.
        tokenizer: the model's.
        vocab_size: token ids are below it.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._chat_template: ChatTemplate | None = None  # loaded with the first conversation

    def token_ids(self, prompt: Prompt) -> TokenIds:
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else np.asarray(prompt)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"the prompt is {prompt!r}, expected text or token ids, at least one")
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            raise ValueError(
                f"the prompt has token ids from {ids.min()} to {ids.max()}, expected 0 <= id < {self._vocab_size}"
            )
        return np.ascontiguousarray(ids, np.int32)

    def of_conversation(self, messages: Sequence[Message], **options: Any) -> TokenIds:
        """`options` are those of `ChatTemplate.render`."""
        if self._chat_template is None:
            self._chat_template = ChatTemplate.load(self._folder)
        text = self._chat_template.render(messages, **options)
        return self._tokenizer.encode(text, add_special_tokens=False)  # the template has written them

    def of_conversations(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> TokenIds | list[TokenIds]:
        """Of one conversation, or of each of a list of them."""
        given: dict[str, Any] = fitting("chat_template_kwargs", variables, dict[str, object] | None) or {}
        options = {"tools": tools, **given}
        if isinstance(checked_messages(messages)[0], list | tuple):
            return [self.of_conversation(cast("Sequence[Message]", one), **options) for one in messages]
        return self.of_conversation(cast("Sequence[Message]", messages), **options)


def is_one_prompt(prompts: Any) -> bool:
    """Text or token ids, and not several of either; also what is neither, which is then refused as a prompt."""
    if isinstance(prompts, np.ndarray):
        array = cast("npt.NDArray[Any]", prompts)
        return array.ndim < 2 and array.dtype.kind in "iu"
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes) or not prompts:
        return True
    return isinstance(prompts[0], int | np.integer)
