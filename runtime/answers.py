"""Answers as their client sees them: tokens turned into text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np

from hotset.runtime.completion import FinishReason
from hotset.runtime.connection import Connection
from hotset.runtime.errors import HotsetError, RequestFailed
from hotset.runtime.messages.client import Generated
from hotset.runtime.model.tokenizer import TextStream
from hotset.runtime.stop_strings import StopStrings


class Piece(msgspec.Struct, frozen=True):
    """A part of an answer as it comes: the text that `token_ids` completed. The last one has `finish_reason`.

    `cached_tokens`, in the last one: how much of the prompt was found in the prefix cache.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


class Completion(msgspec.Struct, frozen=True):
    """A whole answer. `finish_reason`: "stop" (end-of-text token or stop string), "length" or "abort"."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0


class AnswerText:
    """One answer on its way.

    Args:
        text: decodes its tokens.
        stops: the strings before which it ends.

    Attributes:
        stopped: whether one of those came; what follows it is not part of the answer.
    """

    def __init__(self, text: TextStream, stops: StopStrings) -> None:
        self.stopped = False
        self._text = text
        self._stops = stops

    def pieces(self, answer: Generated) -> Iterator[Piece]:
        """One for each of the next tokens. The last of the answer says why it ends, unless that is an error."""
        tokens: list[int] = np.frombuffer(answer.tokens, np.int32).tolist()
        finish = None if answer.finish == "error" else answer.finish
        for index, token in enumerate(tokens):
            piece, self.stopped = self._stops.push(self._text.push(token))
            if self.stopped:
                yield Piece(piece, [token], "stop", answer.cached_tokens)
                return
            if finish is not None and index == len(tokens) - 1:
                yield Piece(piece + self._rest(), [token], finish, answer.cached_tokens)
            else:
                yield Piece(piece, [token])
        if finish is not None and not tokens:
            yield Piece(self._rest(), [], finish, answer.cached_tokens)

    def _rest(self) -> str:
        """What was held back because more might have followed."""
        return self._stops.finish_with(self._text.finish())


def answer_pieces(connection: Connection, number: int, text: AnswerText, owner: object) -> Iterator[Piece]:
    """The answer to request `number`, which is aborted if the iterator is closed before; first an empty piece.

    `owner` of the connection lives as long as the iterator.
    """
    finished = False
    try:
        yield Piece("", [])
        while not finished:
            try:
                answer = connection.answer(number)
            except HotsetError:
                finished = True
                raise
            finished = answer.finish is not None
            yield from text.pieces(answer)
            if text.stopped:
                return
            if answer.finish == "error":
                raise RequestFailed(answer.error or "the request failed")
    finally:
        connection.end(number, aborts=not finished)


def join_pieces(prompt_tokens: int, pieces: Iterable[Piece]) -> Completion:
    """The whole answer of a stream."""
    parts = list(pieces)
    return Completion(
        "".join(piece.text for piece in parts),
        [token for piece in parts for token in piece.token_ids],
        parts[-1].finish_reason or "abort",
        prompt_tokens,
        parts[-1].cached_tokens,
    )
