"""`Backend`: the whole runtime as one object in the user's program.

It starts the coordinator as a process of its own, sends it token ids and gets token ids back (connection.py); text and
tokens are turned into each other in this process (prompts.py, answers.py). It never touches the arena, so nothing that
happens to the user's program can damage it.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Self, overload

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.answers import AnswerText, Completion, Piece, answer_pieces, join_pieces
from hotset.runtime.argument_types import integer
from hotset.runtime.config import BackendConfig, model_path
from hotset.runtime.connection import Connection
from hotset.runtime.errors import TooManyPins
from hotset.runtime.expert_ids import distinct_experts
from hotset.runtime.memory_tiers import PageCache
from hotset.runtime.messages.client import (
    CheckCache,
    Defragment,
    GetStats,
    PageOutExperts,
    PinExperts,
    ResetStats,
    StartInstance,
    Submit,
    UnpinExperts,
)
from hotset.runtime.model.chat_template import Message
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.gguf_folder import model_folder
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.runtime.plan import InstancePlan, plan_instance
from hotset.runtime.prompts import Prompt, Prompts, TokenIds, is_one_prompt
from hotset.runtime.sampling_params import SamplingParams
from hotset.runtime.settings import check_settings, takes
from hotset.runtime.stats import BackendStats
from hotset.runtime.stop_strings import StopStrings
from hotset.shm.segment import check_instance_name, new_instance_name

MOST_MOVES = 1 << 62  # what a message can say; more than there are pages


class Backend:
    """Serves one model. Use it as a context manager, or call `close`; any number may run in one program.

    Args:
        model: folder of a checkpoint in Hugging Face's layout, or a GGUF file; None is the small model that ships
            with hotset.
        settings: the fields of `BackendConfig`, by name.

    Raises:
        ModelNotFound, UnsupportedModel, CorruptCheckpoint: the model cannot be served.
        BudgetTooSmall, ValueError: the settings cannot be met.
        BackendError: the processes could not start.

    All methods may be called from any thread, and from signal handlers. One that is not closed and that nobody has any
    more, a stream neither, ends when the garbage collector finds it.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **settings: Any) -> None:
        folder = model_path(model)
        check_settings(settings, "Backend", BackendConfig)
        self.config = BackendConfig(model=str(model_folder(folder)), **settings)
        name = new_instance_name() if self.config.name is None else self.config.name
        self.instance = check_instance_name(name)
        # First the process: its interpreter starts while we look at the model.
        self._connection = Connection(self.instance)
        weakref.finalize(self, self._connection.abandon).atexit = False  # then the coordinator notices by itself
        self._page_cache: PageCache | None = None
        try:
            self._model = ModelConfig.load(self.config.model)
            checkpoint = Checkpoint.open(self.config.model, self._model)
            self.plan: InstancePlan = plan_instance(self.config, self._model, checkpoint)
            self._connection.send(StartInstance(self.instance, self.config, self.plan))
            self.tokenizer = Tokenizer(self.config.model, self._model.eos_token_ids)
            self._prompts = Prompts(self.config.model, self.tokenizer, self._model.vocab_size)
            self._page_cache = PageCache(checkpoint)
            self._connection.wait_until_ready()
        except BaseException:
            self.close()
            raise

    # ---- answers

    @takes("params", SamplingParams)
    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The answer, piece by piece. The request is sent at once; closing the iterator aborts it.

        Raises `RequestFailed` if the request cannot be served, `BackendError` if the backend has died.
        """
        return self._begin(self._prompts.token_ids(prompt), _sampling_params(params))

    def _begin(self, ids: TokenIds, params: SamplingParams) -> Iterator[Piece]:
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(63))
        number = self._connection.begin(lambda number: Submit(number, ids.tobytes(), params))
        text = AnswerText(self.tokenizer.stream(), StopStrings(params.stop_strings))
        pieces = answer_pieces(self._connection, number, text, self)
        next(pieces)  # into its try block, so that closing an iterator that was never asked aborts too
        return pieces

    @overload
    def generate(self, prompts: Sequence[str], params: SamplingParams | None = None) -> list[Completion]: ...
    @overload
    def generate(self, prompts: Prompt, params: SamplingParams | None = None) -> Completion: ...
    @takes("params", SamplingParams)
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Completion | list[Completion]:
        """The whole answer to a prompt (text or token ids), or a list of answers to a list of prompts, in order.

        Several prompts run at once, spread over the workers.
        """
        single = is_one_prompt(prompts)
        batch: list[Any] = [prompts] if single else list(prompts)
        params = _sampling_params(params)
        encoded = [self._prompts.token_ids(prompt) for prompt in batch]
        streams = [self._begin(ids, params) for ids in encoded]
        answers = [join_pieces(len(ids), pieces) for ids, pieces in zip(encoded, streams, strict=True)]
        return answers[0] if single else answers

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Completion]: ...
    @takes("params", SamplingParams)
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion | list[Completion]:
        """The assistant's answer to a conversation, or a list of answers to a list of conversations, in order.

        Args:
            messages: dicts with "role" and "content", as OpenAI has them.
            params: of the answers.
            tools: functions that the model may ask for, as its template takes them.
            chat_template_kwargs: the template's own variables, such as `enable_thinking`.

        Raises `NoChatTemplate` or `ChatTemplateError`, and what `generate` raises.
        """
        prompts = self._prompts.of_conversations(messages, tools, chat_template_kwargs)
        return self.generate(prompts, params)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> npt.NDArray[np.int32]:
        """A conversation's token ids, for `stream` and `generate`; `options` are those of `ChatTemplate.render`."""
        return self._prompts.of_conversation(messages, **options)

    # ---- numbers

    def stats(self) -> BackendStats:
        """Counters of all processes added up, and what is in memory now."""
        reply = self._connection.ask(GetStats)
        tiers = reply.stats.tiers
        if self._page_cache is not None:
            tiers = self._page_cache.complete(tiers, reply.resident)
        return msgspec.structs.replace(reply.stats, tiers=tiers)

    def defragment(self, max_moves: int | None = None) -> int:
        """Moves KV pages in use together at the front of the arena, at most `max_moves`; returns how many moved.

        Sequences stand still for that long. Attention does not need it: it is for contiguous views of pages.
        """
        if max_moves is not None:
            max_moves = min(integer("max_moves", max_moves, 0), MOST_MOVES)
        return self._connection.ask(lambda query: Defragment(query, max_moves)).moves

    def check_cache(self) -> str | None:
        """What contradicts itself in the bookkeeping of the KV pages, which is a defect; None if all is well."""
        return self._connection.ask(CheckCache).problem

    def reset_stats(self) -> None:
        """Counts from here on."""
        self._connection.raise_if_dead()
        self._connection.send(ResetStats())

    # ---- experts in memory

    def pin_experts(self, layer: int, experts: Any) -> None:
        """Keeps these experts in memory until `unpin_experts`, whoever is killed. Those that are absent begin to be
        loaded at once; `stats().pinned_experts_absent` says how many are still to come.

        Args:
            experts: integers, or [tokens, n], as a router gives them; an expert counts once.

        Raises `TooManyPins`, and pins none of them, if more than the setting `user_pins` would be pinned.
        """
        layer, ids = self._named(layer, experts)
        pinned = self._connection.ask(lambda query: PinExperts(query, layer, ids)).pinned
        if pinned > self.config.user_pins:
            raise TooManyPins(pinned, self.config.user_pins)

    def unpin_experts(self, layer: int, experts: Any) -> None:
        """They may be evicted again, as any other; those that were not pinned are left as they are. `experts` as for
        `pin_experts`."""
        layer, ids = self._named(layer, experts)
        self._connection.ask(lambda query: UnpinExperts(query, layer, ids))

    def page_out(self, layer: int, experts: Any) -> list[int]:
        """Frees the slots of these experts, given as for `pin_experts`; one that a worker is using just now stays.

        Returns those for which this was refused: they are pinned by `pin_experts`, or the pager has no time to listen.
        """
        layer, ids = self._named(layer, experts)
        return self._connection.ask(lambda query: PageOutExperts(query, layer, ids)).refused

    def _named(self, layer: int, experts: Any) -> tuple[int, list[int]]:
        return self._model.layer_with_experts(layer), distinct_experts(experts, self._model.num_experts)

    # ---- life

    def close(self) -> None:
        """Ends every request, stops the processes and removes what they shared. May be called again.

        In a forked process it does nothing: the instance is the parent's.
        """
        if self._connection.is_forked:
            return
        try:
            self._connection.close()
        finally:
            if self._page_cache is not None:
                self._page_cache.close()

    @property
    def coordinator_pid(self) -> int:
        return self._connection.coordinator_pid

    @property
    def worker_pids(self) -> list[int]:
        return self._connection.worker_pids

    @property
    def pager_pid(self) -> int:
        return self._connection.pager_pid

    def __enter__(self) -> Self:
        self._connection.raise_if_dead()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sampling_params(params: Any) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params is {params!r}, expected SamplingParams(...) or None")
    return params
