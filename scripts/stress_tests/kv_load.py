"""Clients of the KV stress test: what they ask for, what they have to get, and who kills processes meanwhile."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator

from stress_tests.kv_report import Report

from hotset.runtime import Backend, BackendError, RequestFailed, SamplingParams
from hotset.shm.segment import PREFIX

MAX_MODEL_LEN = 256
MAX_TOKENS = 96
CLIENTS_PER_WORKER = 3
KILL_SECONDS = 2.5  # on the average
ANSWER_SECONDS = 60.0  # without a token for so long a request counts as standing still
BEGINNINGS = [
    "class Service:\n    def __init__(self, name):\n        self.name = name\n\n    def ",
    "import os\nimport sys\n\n\ndef main(arguments):\n    for argument in arguments:\n        ",
    "def fibonacci(n):\n",
]
ENDS = ["start(self", "stop(self):\n", "print(", "return ", "if ", "x = 1\ny = 2\n", "", "while True:\n        "]


def parameters(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, routing="off", ignore_eos=True)


def record_answers(model: str | None) -> dict[str, list[int]]:
    """What each prompt gets when it is alone."""
    prompts = [beginning + end for beginning in BEGINNINGS for end in ENDS]
    with Backend(model, workers=1, max_model_len=MAX_MODEL_LEN, warm_start=False) as backend:
        return {prompt: backend.generate(prompt, parameters(MAX_TOKENS)).token_ids for prompt in prompts}


class Load:
    """Threads that ask one question after another and compare each answer with the one recorded."""

    def __init__(self, backend: Backend, answers: dict[str, list[int]], report: Report, seed: int) -> None:
        self._backend, self._answers, self._report = backend, answers, report
        self.stopping = threading.Event()
        self.requests = self.tokens = self.aborted = 0
        self.refused: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.last_token: dict[int, float] = {}
        count = CLIENTS_PER_WORKER * backend.config.workers
        self._threads = [
            threading.Thread(target=self._ask, args=(number, random.Random(seed * 1000 + number)), daemon=True)
            for number in range(count)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int, chance: random.Random) -> None:
        prompts = list(self._answers)
        while not self.stopping.is_set():
            prompt, max_tokens = chance.choice(prompts), chance.randint(1, MAX_TOKENS)
            leaves_after = chance.randint(1, max_tokens) if chance.random() < 0.2 else None
            self._one(number, prompt, max_tokens, leaves_after)
        self.last_token.pop(number, None)

    def _one(self, number: int, prompt: str, max_tokens: int, leaves_after: int | None) -> None:
        got: list[int] = []
        error, expected = None, self._answers[prompt][:max_tokens]
        self.last_token[number] = time.monotonic()
        try:
            pieces = self._backend.stream(prompt, parameters(max_tokens))
            for piece in pieces:
                self.last_token[number] = time.monotonic()
                got += piece.token_ids
                if leaves_after is not None and len(got) >= leaves_after:
                    pieces.close()  # type: ignore[attr-defined]
                    break
        except RequestFailed as failure:
            error = str(failure)
        except BackendError as failure:
            self._report.check("the instance lives", self.stopping.is_set(), str(failure))
            self.stopping.set()
            return
        with self._lock:
            self.requests += 1
            self.tokens += len(got)
            self.aborted += leaves_after is not None
            if error:
                self.refused[error.partition(";")[0]] += 1
        whole = leaves_after is None and error is None
        self._report.check(
            "every answer is the one a request gets alone",
            got == (expected if whole else expected[: len(got)]),
            f"{prompt!r} with {max_tokens} tokens: {got}, expected {expected}",
        )
        if error:
            clear = "workers died serving it" in error or "SIGKILL" in error
            self._report.check("a request that fails says why", clear, error)

    def standing_still(self) -> list[int]:
        now = time.monotonic()
        return [number for number, last in list(self.last_token.items()) if now - last > ANSWER_SECONDS]

    def join(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        alive = [thread for thread in self._threads if thread.is_alive()]
        self._report.check("no request stands still", not alive, f"{len(alive)} requests got no answer any more")


def killer(backend: Backend, load: Load, chance: random.Random, kills: Counter[str]) -> None:
    """Kills a worker or the pager now and then; children of the coordinator, whatever their pids are by now."""
    while not load.stopping.wait(chance.expovariate(1 / KILL_SECONDS)):
        children = list(_children(backend.coordinator_pid))
        if children:
            pid, kind = chance.choice(children)
            try:
                os.kill(pid, signal.SIGKILL)
                kills[kind] += 1
            except ProcessLookupError:
                pass


def _children(coordinator: int) -> Iterator[tuple[int, str]]:
    """Workers and pager by process id; those that are still starting are left alone."""
    try:
        pids = open(f"/proc/{coordinator}/task/{coordinator}/children").read().split()  # noqa: SIM115, PTH123
    except FileNotFoundError:
        return
    for pid in map(int, pids):
        try:
            with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/cmdline") as command:  # noqa: PTH123
                if f"/dev/shm/{PREFIX}" in maps.read():
                    yield pid, "pager" if "pager" in command.read() else "worker"
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
