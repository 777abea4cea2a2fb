"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers
from numpy.typing import NDArray

from hotset.runtime.model.config_file import ConfigFile
from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound

_REPLACEMENT: Final = "\ufffd"  # what a decoder puts in the place of bytes that are not UTF-8 (yet)


class Tokenizer:
    """The tokenizer.json of a model folder, and whether its tokenizer_config.json wants a token before each text, which
    tokenizer.json need not say (DeepSeek's do not). `eos_token_ids` are those of the model's configuration.
    """

    def __init__(self, folder: str | Path, eos_token_ids: Iterable[int] = ()) -> None:
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ModelNotFound(Path(folder), f"{folder} has no tokenizer.json.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CorruptCheckpoint(path, f"{path} cannot be read as a tokenizer: {error}.") from error
        self.eos_token_ids = frozenset(eos_token_ids)
        options = ConfigFile.read_if_there(path.with_name("tokenizer_config.json"))
        begins = options.flag("add_bos_token")
        self._first: int | None = self._tokenizer.token_to_id(options.token("bos_token")) if begins else None

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> NDArray[np.int32]:
        """Token ids of `text`; with those that the model's own tokenizer puts around it, unless the text has them."""
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # of a text that is no Unicode, as bytes that are not UTF-8 become on a command line
            raise ValueError(f"the prompt is {text!r}, expected text: surrogates not allowed") from None
        if add_special_tokens and self._first is not None and ids[:1] != [self._first]:
            ids = [self._first, *ids]
        return np.array(ids, dtype=np.int32)

    def decode(self, token_ids: Sequence[int] | NDArray[np.int32]) -> str:
        """Text of the ids, special tokens left out. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """The text of a growing list of tokens, piece by piece; the pieces joined are the text of the whole list.

    A token may end in the middle of a UTF-8 character: its first bytes are held back until the rest has come.
    And a token's text may depend on its neighbours, so each piece is the growth of the text of the last few
    tokens, as in vLLM's and text-generation-inference's prefix offset.
    """

    _CONTEXT: Final = 8  # tokens; a character has four bytes at most

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._emitted = 0  # characters of the text of _tokens that are with the caller already

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly none."""
        self._tokens.append(token_id)
        text = self._complete()
        piece = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        if len(self._tokens) >= 2 * self._CONTEXT:
            del self._tokens[: -self._CONTEXT]
            self._emitted = len(self._complete())
        return piece

    def finish(self) -> str:
        """What was held back: U+FFFD where the last character is incomplete."""
        piece = self._tokenizer.decode(self._tokens)[self._emitted :]
        self._tokens.clear()
        self._emitted = 0
        return piece

    def _complete(self) -> str:
        """The text of the tokens, without the last character if that may still be one in the making."""
        text = self._tokenizer.decode(self._tokens)
        return text[:-1] if text.endswith(_REPLACEMENT) else text
