"""`Backend`: the whole runtime as one object in the user's program.

It starts the coordinator as a process of its own, sends it token ids and gets token ids back; text and tokens are
turned into each other in this process (answers.py). It never touches the arena, so nothing that happens to the user's
program can damage it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import secrets
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast, overload

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.answers import AnswerText, Completion, Piece, join_pieces
from hotset.runtime.argument_types import fitting, integer, integers
from hotset.runtime.config import TRAINED_MODEL, BackendConfig
from hotset.runtime.errors import BackendError, HotsetError, RequestFailed, TooManyPins
from hotset.runtime.memory_tiers import PageCache
from hotset.runtime.messages import (
    Abort,
    CheckCache,
    Defragment,
    Generated,
    GetStats,
    InstanceFailed,
    InstanceReady,
    MessageRefused,
    PageOutExperts,
    PinExperts,
    Reply,
    ResetStats,
    Shutdown,
    StartInstance,
    Submit,
    ToClient,
    UnpinExperts,
)
from hotset.runtime.model.chat_template import ChatTemplate, Message, checked_messages
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.gguf_folder import model_folder
from hotset.runtime.model.tokenizer import Tokenizer
from hotset.runtime.plan import InstancePlan, plan_instance
from hotset.runtime.sampling_params import SamplingParams
from hotset.runtime.settings import check_settings, takes
from hotset.runtime.shared_channel import SharedChannel
from hotset.runtime.stats import BackendStats
from hotset.runtime.stop_strings import StopStrings
from hotset.runtime.supervision import Child
from hotset.shm.segment import (
    InstanceLock,
    InstanceNameTaken,
    check_instance_name,
    new_instance_name,
    remove_ipc_objects,
)

COORDINATOR_MODULE = "hotset.runtime.coordinator"
START_SECONDS = 60.0
STOP_SECONDS = 5.0
MOST_MOVES = 1 << 62  # what a message can say; more than there are pages

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]]


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

    All methods may be called from any thread, and from signal handlers.

    Who waits for an answer has a queue in `_answers` or `_replies`, and only then looks whether the coordinator is
    `_dead`; the reader thread says so first, and then tells every queue. So nobody waits for ever, and no lock is held,
    which the garbage collector would need to end an abandoned stream wherever it finds one.
    """

    def __init__(self, model: str | PathLike[str] | None = None, **settings: Any) -> None:
        given: Any = model
        if not isinstance(given, str | PathLike | None) or model == "":
            raise ValueError(f"model is {model!r}, expected the path of a checkpoint folder or a GGUF file, or None")
        check_settings(settings, "Backend", BackendConfig)
        folder = TRAINED_MODEL if model is None else Path(model)
        self.config = BackendConfig(model=str(model_folder(folder)), **settings)
        name = new_instance_name() if self.config.name is None else self.config.name
        self.instance = check_instance_name(name)
        self._process = os.getpid()
        self._answers: dict[int, queue.SimpleQueue[Generated | HotsetError]] = {}
        self._replies: dict[int, queue.SimpleQueue[Reply | HotsetError]] = {}
        self._numbers = itertools.count()
        self._page_cache_lock = threading.RLock()  # both are taken again by a signal handler in their thread
        self._reap_lock = threading.RLock()
        self._ready = threading.Event()
        self._dead: BackendError | None = None
        self._first_close = threading.Lock()  # never released
        self._closing = False
        self._chat_template: ChatTemplate | None = None  # loaded with the first conversation
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the coordinator
        # First the process: its interpreter starts while we look at the model.
        self._coordinator: Child[ToClient] = Child(
            COORDINATOR_MODULE, ToClient, dies_with_us=False, own_session=True, stderr=self._stderr
        )
        self._channel = SharedChannel(self._coordinator.channel)
        self._reader = threading.Thread(target=self._read, name=f"hotset-{self.instance}", daemon=True)
        try:
            self._reader.start()
            model_config = ModelConfig.load(self.config.model)
            checkpoint = Checkpoint.open(self.config.model, model_config)
            self.plan: InstancePlan = plan_instance(self.config, model_config, checkpoint)
            self._channel.send(StartInstance(self.instance, self.config, self.plan))
            self.tokenizer = Tokenizer(self.config.model, model_config.eos_token_ids)
            self._model = model_config
            self._page_cache = PageCache(checkpoint)
            if not self._ready.wait(START_SECONDS):
                raise BackendError(f"the instance was not ready after {START_SECONDS:.0f} s")
            self._raise_if_dead()
        except BaseException:
            self.close()
            raise

    # ---- answers

    @takes("params", SamplingParams)
    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Piece]:
        """The answer, piece by piece. The request is sent at once; closing the iterator aborts it.

        Raises `RequestFailed` if the request cannot be served, `BackendError` if the backend has died.
        """
        params = _sampling_params(params)
        prompt_ids = self._prompt_ids(prompt)
        pieces = self._pieces(self._submit(prompt_ids, params), params)
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
        if _is_one_prompt(prompts):
            return self._complete(prompts, params)  # type: ignore[arg-type]
        batch: list[Any] = list(prompts)
        encoded = [self._prompt_ids(prompt) for prompt in batch]
        streams = [self.stream(ids, params) for ids in encoded]
        return [join_pieces(len(ids), pieces) for ids, pieces in zip(encoded, streams, strict=True)]

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
        single = not isinstance(checked_messages(messages)[0], list | tuple)
        conversations: list[Any] = [messages] if single else list(messages)
        variables: dict[str, Any] = (
            fitting("chat_template_kwargs", chat_template_kwargs, dict[str, object] | None) or {}
        )
        prompts = [self.chat_prompt(c, **{"tools": tools, **variables}) for c in conversations]
        return self.generate(prompts[0] if single else prompts, params)  # type: ignore[arg-type]

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> npt.NDArray[np.int32]:
        """A conversation's token ids, for `stream` and `generate`; `options` are those of `ChatTemplate.render`."""
        if self._chat_template is None:
            self._chat_template = ChatTemplate.load(self.config.model)
        text = self._chat_template.render(messages, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)  # the template has written them

    def _complete(self, prompt: Prompt, params: SamplingParams | None) -> Completion:
        ids = self._prompt_ids(prompt)
        return join_pieces(len(ids), self.stream(ids, params))

    def _prompt_ids(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the prompt is {prompt!r}, expected text: {error.reason}") from None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else np.asarray(prompt)
        if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"the prompt is {prompt!r}, expected text or token ids, at least one")
        if int(ids.min()) < 0 or int(ids.max()) >= self._model.vocab_size:
            raise ValueError(
                f"the prompt has token ids from {ids.min()} to {ids.max()}, expected 0 <= id < {self._model.vocab_size}"
            )
        return np.ascontiguousarray(ids, np.int32)

    def _submit(self, prompt: npt.NDArray[np.int32], params: SamplingParams) -> int:
        if params.seed is None:
            params = msgspec.structs.replace(params, seed=secrets.randbits(63))
        self._raise_if_forked()
        number = next(self._numbers)
        self._answers[number] = queue.SimpleQueue()
        try:
            self._raise_if_dead()
            self._send(Submit(number, prompt.tobytes(), params))
        except BaseException:
            self._end(number, aborts=True)
            raise
        return number

    def _pieces(self, number: int, params: SamplingParams) -> Iterator[Piece]:
        answers = self._answers[number]
        text = AnswerText(self.tokenizer.stream(), StopStrings(params.stop_strings))
        finished = False
        try:
            yield Piece("", [])
            while not finished:
                self._raise_if_forked()
                answer = answers.get()
                if isinstance(answer, HotsetError):
                    finished = True
                    raise answer
                finished = answer.finish is not None
                yield from text.pieces(answer)
                if text.stopped:
                    return
                if answer.finish == "error":
                    raise RequestFailed(answer.error or "the request failed")
        finally:
            if not self._is_forked():
                self._end(number, aborts=not finished)

    def _end(self, number: int, *, aborts: bool) -> None:
        """Nobody waits for answers of this number any more."""
        self._answers.pop(number, None)
        if aborts and self._dead is None:
            self._send(Abort(number))

    # ---- numbers

    def stats(self) -> BackendStats:
        """Counters of all processes added up, and what is in memory now."""
        reply = self._ask(GetStats)
        with self._page_cache_lock:  # not the other: this looks at hundreds of experts
            tiers = self._page_cache.complete(reply.stats.tiers, reply.resident)
        return msgspec.structs.replace(reply.stats, tiers=tiers)

    def defragment(self, max_moves: int | None = None) -> int:
        """Moves KV pages in use together at the front of the arena, at most `max_moves`; returns how many moved.

        Sequences stand still for that long. Attention does not need it: it is for contiguous views of pages.
        """
        if max_moves is not None:
            max_moves = min(integer("max_moves", max_moves, 0), MOST_MOVES)
        return self._ask(lambda query: Defragment(query, max_moves)).moves

    def check_cache(self) -> str | None:
        """What contradicts itself in the bookkeeping of the KV pages, which is a defect; None if all is well."""
        return self._ask(CheckCache).problem

    def reset_stats(self) -> None:
        """Counts from here on."""
        self._raise_if_dead()
        self._send(ResetStats())

    def _ask(self, question: Callable[[int], Any]) -> Any:
        """Sends a message that the coordinator answers, and waits for the answer."""
        self._raise_if_forked()
        number = next(self._numbers)
        replies = self._replies[number] = queue.SimpleQueue()
        try:
            self._raise_if_dead()
            self._send(question(number))
            reply = replies.get()
        finally:
            self._replies.pop(number, None)
        if isinstance(reply, HotsetError):
            raise reply
        return reply

    # ---- experts in memory

    def pin_experts(self, layer: int, experts: Iterable[int]) -> None:
        """Keeps these experts in memory, until `unpin_experts`: those that are absent begin to be loaded at once.

        `stats().pinned_experts_absent` says how many are still to come. Raises `TooManyPins`, and pins none of them,
        if more than the setting `user_pins` would be pinned.
        """
        layer, ids = self._expert_ids(layer, experts)
        pinned = self._ask(lambda query: PinExperts(query, layer, ids)).pinned
        if pinned > self.config.user_pins:
            raise TooManyPins(pinned, self.config.user_pins)

    def unpin_experts(self, layer: int, experts: Iterable[int]) -> None:
        """They may be evicted again, as any other; those that were not pinned are left as they are."""
        layer, ids = self._expert_ids(layer, experts)
        self._ask(lambda query: UnpinExperts(query, layer, ids))

    def page_out(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Frees the slots of these experts; one that a worker is using at this moment stays.

        Returns those for which this was refused: they are pinned by `pin_experts`, or the pager has no time to listen.
        """
        layer, ids = self._expert_ids(layer, experts)
        return self._ask(lambda query: PageOutExperts(query, layer, ids)).refused

    def _expert_ids(self, layer: int, experts: Iterable[int]) -> tuple[int, list[int]]:
        layer = integer("layer", layer)
        if not 0 <= layer < self._model.num_layers or layer in self._model.dense_layers:
            raise ValueError(f"layer is {layer}, expected one of {self._model.num_layers} that has experts")
        ids = integers("experts", experts)
        if wrong := [expert for expert in ids if not 0 <= expert < self._model.num_experts]:
            raise ValueError(f"expert id is {wrong[0]}, expected 0 <= id < {self._model.num_experts}")
        return layer, ids

    # ---- life

    def close(self) -> None:
        """Ends every request, stops the processes and removes what they shared. May be called again.

        In a forked process it does nothing: the instance is the parent's.
        """
        if self._is_forked() or not self._first_close.acquire(blocking=False):
            return
        try:
            self._closing = True
            self._send(Shutdown())
            self._reap(STOP_SECONDS)
        except BaseException:  # a second Ctrl-C, say: whoever interrupts this wants it to end now
            self._coordinator.kill()
            self._reap(STOP_SECONDS)
            raise
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Ends every request and what this process has of the instance, whose processes have ended."""
        self._die(BackendError("the backend is closed"))
        if self._reader.is_alive() and self._reader is not threading.current_thread():
            self._reader.join(STOP_SECONDS)
        self._channel.close()
        page_cache: PageCache | None = getattr(self, "_page_cache", None)
        if page_cache is not None:
            with self._page_cache_lock:
                page_cache.close()
        self._stderr.close()

    def __enter__(self) -> Self:
        self._raise_if_dead()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: msgspec.Struct) -> None:
        self._raise_if_forked()
        self._channel.send(message)

    def _is_forked(self) -> bool:
        """Whether this is a process forked from the one that made this Backend: nobody reads answers here."""
        return os.getpid() != self._process

    def _raise_if_forked(self) -> None:
        if self._is_forked():
            raise BackendError(
                f"this Backend belongs to process {self._process}, and process {os.getpid()} was forked from it: it "
                "needs a Backend of its own"
            )

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _read(self) -> None:
        """The reader thread: hands answers to whoever waits for them, until the coordinator is gone."""
        error = BackendError("the thread that reads answers has failed")
        try:
            error = self._hand_out_answers()
        finally:
            self._die(error)

    def _hand_out_answers(self) -> BackendError:
        """Returns what ended the instance."""
        reason = None
        for message in self._channel.messages():
            match message:
                case Generated(request=number):
                    answers = self._answers.get(number)
                    if answers is not None:
                        answers.put(message)
                case InstanceReady():
                    self.worker_pids = message.worker_pids
                    self.pager_pid = message.pager_pid
                    self._ready.set()
                case InstanceFailed():
                    reason = message.reason
                case MessageRefused():
                    self._fail(message.number, RequestFailed(message.reason))
                case _:
                    replies = self._replies.get(message.query)
                    if replies is not None:
                        replies.put(message)
        if self._closing:
            return BackendError("the backend is closed")
        how = self._reap(STOP_SECONDS)
        return BackendError((reason or f"the coordinator {how}") + self._last_words())

    def _fail(self, number: int, error: HotsetError) -> None:
        """Whoever waits for the answer of this number gets `error`."""
        for waiting in (self._answers.get(number), self._replies.get(number)):
            if waiting is not None:
                waiting.put(error)

    def _reap(self, timeout: float) -> str:
        """Waits for the coordinator's end, by force if need be, and cleans up after it. Says how it ended."""
        with self._reap_lock:
            try:
                how = self._coordinator.reap(timeout, close_channel=False)
            except subprocess.TimeoutExpired:
                self._coordinator.kill()
                how = self._coordinator.reap(close_channel=False)
            # Where the name is another instance's by now, or /dev/shm cannot be written, nothing of ours is left there.
            with contextlib.suppress(InstanceNameTaken, OSError):
                lock = InstanceLock(self.instance)
                try:
                    remove_ipc_objects(self.instance)
                finally:
                    lock.release()
            return how

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"; its last line was: {lines[-1]}" if lines else ""

    def _die(self, error: BackendError) -> None:
        """From now on every waiting and every further call gets `error`."""
        self._dead = self._dead or error
        for waiting in [*self._answers.values(), *self._replies.values()]:
            waiting.put(error)
        self._ready.set()

    @property
    def coordinator_pid(self) -> int:
        return self._coordinator.pid


def _sampling_params(params: Any) -> SamplingParams:
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise ValueError(f"params is {params!r}, expected SamplingParams(...) or None")
    return params


def _is_one_prompt(prompts: Any) -> bool:
    """Text or token ids, and not several of either; also what is neither, which is then refused as a prompt."""
    if isinstance(prompts, np.ndarray):
        array = cast("npt.NDArray[Any]", prompts)
        return array.ndim < 2 and array.dtype.kind in "iu"
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes) or not prompts:
        return True
    return isinstance(prompts[0], int | np.integer)
