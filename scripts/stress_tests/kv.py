"""The KV stress test: an instance with too little KV memory, whose workers and pager are killed while it is used.

    scripts/stress kv --workers 4 --seconds 30

Clients ask greedily with exact routing, so every answer is known beforehand from an instance that nothing happens to.
Prompts begin alike and share pages, streams are closed halfway, pages are moved together, sequences are preempted and
move between workers. Meanwhile reader processes look at pages from outside (G3), and the bookkeeping is checked (A13).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np
import posix_ipc
from stress_tests.stop_signals import ignore_stops, stop_in_order

from hotset.runtime import Backend, BackendError, HotsetError, RequestFailed, SamplingParams
from hotset.runtime.kv.layer_groups import pages_of_sequence
from hotset.shm import _core
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.page_reader import PageReader, StalePage
from hotset.shm.segment import (
    PREFIX,
    SHM_FOLDER,
    InstanceLock,
    Segment,
    new_instance_name,
    queue_name,
    remove_ipc_objects,
)

MAX_MODEL_LEN = 256
MAX_TOKENS = 96
STEP_TOKENS = 32  # so that a prompt takes several steps, of which any may be the last of its worker
PAGES_PER_WORKER = 6  # of a model without windows, whose requests take up to nine: sequences are preempted
CLIENTS_PER_WORKER = 3
KILL_SECONDS = 2.5  # on the average
ANSWER_SECONDS = 60.0  # without a token for so long a request counts as standing still
PUBLICATIONS = 100_000
PUBLICATION_SECONDS = 600.0
READER_SECONDS = 30.0
SMALL = Geometry(
    num_layers=1, num_experts=8, num_pages=2, page_nbytes=4096, max_sequences=1, max_model_len=64, num_processes=2
)
BEGINNINGS = [
    "class Service:\n    def __init__(self, name):\n        self.name = name\n\n    def ",
    "import os\nimport sys\n\n\ndef main(arguments):\n    for argument in arguments:\n        ",
    "def fibonacci(n):\n",
]
ENDS = ["start(self", "stop(self):\n", "print(", "return ", "if ", "x = 1\ny = 2\n", "", "while True:\n        "]


def parameters(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, routing="off", ignore_eos=True)


class Report:
    """How often each thing was checked, and what was wrong."""

    def __init__(self) -> None:
        self.checks: Counter[str] = Counter()
        self.violations: Counter[str] = Counter()
        self.words: list[str] = []
        self._lock = threading.Lock()

    def check(self, name: str, fine: bool, words: str = "", times: int = 1) -> None:
        with self._lock:
            self.checks[name] += times
            if not fine:
                self.violations[name] += 1
                self.words.append(f"{name}: {words}")


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


def watch_pages(instance: str, geometry: Geometry, seed: int, parent: Connection) -> None:
    """A reader process (G3): full pages that it kept have their bytes for as long as they have their generation.

    It ends, and sends what it has found, when the parent says anything, and ends when that is gone.
    """
    ignore_stops()
    reader, segment, chance = PageReader(instance, geometry), Segment.attach(instance, geometry), random.Random(seed)
    checked = stale = wrong = 0
    kept: dict[int, tuple[int, bytes]] = {}
    while not parent.poll():
        row, block = chance.randrange(geometry.max_sequences), chance.randrange(geometry.max_blocks)
        before = _full_page(segment, row, block)
        if before:
            generation = reader.generation(before)
            copy = reader.view(before).tobytes()
            # Looked up again: the row may have got another sequence meanwhile, whose pages fill up yet.
            if _full_page(segment, row, block) == before and reader.generation(before) == generation:
                kept.setdefault(before, (generation, copy))
        for page, (generation, copy) in list(kept.items()):
            try:
                checked += 1
                if reader.read(page, generation) != copy:
                    wrong += 1
                    del kept[page]
            except StalePage:
                stale += 1
                del kept[page]
        time.sleep(0.002)
    with contextlib.suppress(BrokenPipeError):
        parent.send((checked, stale, wrong))


def _full_page(segment: Segment, row: int, block: int) -> int:
    """The page at an index of a sequence's block table if all its tokens are committed, else 0."""
    page = segment.arena.load_u32(Section.BLOCK_TABLES, row, block)  # acquire, so before what says that it is full
    committed = segment.arena.load_u64(Section.SEQUENCES, row, 0)
    granted = segment.arena.load_u32(Section.SEQUENCES, row, 2)
    block_size = segment.layout.geometry.block_size
    return page if block < granted and (block + 1) * block_size <= committed else 0


def change_full_pages(instance: str, geometry: Geometry, stopping: threading.Event) -> None:
    """A planted violation: somebody writes into pages that are full."""
    segment = Segment.attach(instance, geometry)
    pages = segment.view(Section.KV_PAGES)
    while not stopping.wait(0.02):
        for row, block in itertools.product(range(geometry.max_sequences), range(geometry.max_blocks)):
            if page := _full_page(segment, row, block):
                pages[page, 0] = time.monotonic_ns() % 256
    segment.close()


def publish(name: str, rounds: int) -> None:
    """G2's writer: fills a page with a number and publishes it, when both readers have seen the one before."""
    _belong_to_parent()
    segment = Segment.attach(name, SMALL)
    arena, page = segment.arena, segment.view(Section.KV_PAGES)[1].view(np.uint64)
    for number in range(1, rounds + 1):
        page[:] = number
        arena.store_u64(Section.SEQUENCES, 0, 0, number)
        while min(arena.load_u64(Section.COUNTERS, reader, 0) for reader in range(2)) < number:
            os.sched_yield()


def verify(name: str, reader: int, rounds: int, parent: Connection) -> None:
    """G2's reader."""
    _belong_to_parent()
    segment = Segment.attach(name, SMALL)
    arena, page = segment.arena, segment.view(Section.KV_PAGES)[1].view(np.uint64)
    wrong = 0
    for number in range(1, rounds + 1):
        while arena.load_u64(Section.SEQUENCES, 0, 0) < number:
            os.sched_yield()
        wrong += not (page == number).all()
        arena.store_u64(Section.COUNTERS, reader, 0, number)
    parent.send(wrong)


def _belong_to_parent() -> None:
    ignore_stops()
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not _core.die_with_parent(parent.pid):
        os._exit(1)  # it is dead already


def check_publication(report: Report, rounds: int) -> None:
    """G2: what is published is whole."""
    context = multiprocessing.get_context("fork")
    name = new_instance_name()
    lock = InstanceLock(name)
    children: list[ForkProcess] = []
    try:
        segment = Segment.create(name, SMALL)
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        children.append(context.Process(target=publish, args=(name, rounds), daemon=True))
        for reader, (_, theirs) in enumerate(pipes):
            children.append(context.Process(target=verify, args=(name, reader, rounds, theirs), daemon=True))
        for child in children:
            child.start()
        deadline = time.monotonic() + PUBLICATION_SECONDS
        if not all(ours.poll(max(0.0, deadline - time.monotonic())) for ours, _ in pipes):
            raise TimeoutError(f"G2 was not done after {PUBLICATION_SECONDS:.0f} s")
        wrong = sum(ours.recv() for ours, _ in pipes)
        segment.close()
        report.check("what is published is whole (G2)", not wrong, f"{wrong} torn reads", times=2 * rounds)
    finally:
        for child in children:
            if child.pid is not None:
                child.kill()  # those that have not ended by themselves
                child.join()
        remove_ipc_objects(name)
        lock.release()


def record_answers(model: str | None) -> dict[str, list[int]]:
    """What each prompt gets when it is alone."""
    prompts = [beginning + end for beginning in BEGINNINGS for end in ENDS]
    with Backend(model, workers=1, max_model_len=MAX_MODEL_LEN, warm_start=False) as backend:
        return {prompt: backend.generate(prompt, parameters(MAX_TOKENS)).token_ids for prompt in prompts}


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


def stress(options: argparse.Namespace, report: Report) -> dict[str, Any]:
    chance = random.Random(options.seed)
    say = (lambda text: None) if options.json else (lambda text: print(text, file=sys.stderr, flush=True))
    say("recording the answers of requests that nothing happens to ...")
    answers = record_answers(options.model)
    sizes: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": STEP_TOKENS}
    with Backend(options.model, workers=1, warm_start=False, **sizes) as probe:
        plan = probe.plan
    longest = pages_of_sequence(plan.kv_windows, MAX_MODEL_LEN, plan.geometry.block_size, plan.kv_max_step)
    pages = max(PAGES_PER_WORKER * options.workers * longest * plan.geometry.block_size // MAX_MODEL_LEN, longest + 2)
    kills: Counter[str] = Counter()
    moves = defragmentations = 0
    with Backend(
        options.model,
        workers=options.workers,
        kv_cache_memory=pages * plan.geometry.page_nbytes,
        warm_start=False,
        **sizes,
    ) as backend:
        context = multiprocessing.get_context("spawn")
        # Pipes, and no queue or event: these have named semaphores, which a run that is killed leaves behind.
        pipes = [context.Pipe() for _ in range(2)]
        readers = [
            context.Process(
                target=watch_pages,
                args=(backend.instance, backend.plan.geometry, options.seed + number, theirs),
                daemon=True,  # ended with this process when that is interrupted
            )
            for number, (_, theirs) in enumerate(pipes)
        ]
        for reader in readers:
            reader.start()
        for _, theirs in pipes:
            theirs.close()
        load = Load(backend, answers, report, options.seed)
        load.start()
        murderer = threading.Thread(target=killer, args=(backend, load, chance, kills), daemon=True)
        murderer.start()
        if options.plant:
            planted = backend.instance, backend.plan.geometry, load.stopping
            threading.Thread(target=change_full_pages, args=planted, daemon=True).start()
        begin = told = time.monotonic()
        end = begin + options.seconds
        while time.monotonic() < end and not load.stopping.is_set():
            time.sleep(chance.uniform(0.1, 0.6))
            moves += backend.defragment(chance.choice([None, 1, 4]))
            defragmentations += 1
            problem = backend.check_cache()
            report.check("the bookkeeping is consistent (A13)", problem is None, str(problem))
            if still := load.standing_still():
                report.check("no request stands still", False, f"clients {still}; {backend.stats()}")
                break
            if time.monotonic() - told > 5:
                told = time.monotonic()
                stats = backend.stats()
                say(
                    f"{told - begin:5.0f} s  {load.requests} requests, {load.tokens} tokens, {kills.total()} kills, "
                    f"{stats.preemptions} preemptions, {stats.migrations} migrations, {moves} pages moved"
                )
        load.stopping.set()
        load.join()
        murderer.join()
        deadline = time.monotonic() + 5
        while (stats := backend.stats()).kv_pages_used and time.monotonic() < deadline:
            time.sleep(0.05)
        report.check("all pages come back", not stats.kv_pages_used, f"{stats.kv_pages_used} pages are still used")
        problem = backend.check_cache()
        report.check("the bookkeeping is consistent (A13)", problem is None, str(problem))
        for ours, _ in pipes:
            ours.send("stop")
        for ours, _ in pipes:
            if not ours.poll(READER_SECONDS):
                raise TimeoutError(f"a reader said nothing for {READER_SECONDS:.0f} s")
            checked, stale, wrong = ours.recv()
            report.check("kept pages keep their bytes (G3)", not wrong, f"{wrong} pages changed", times=checked)
            report.check("readers learn of reuse (G3)", True, times=stale)
        for reader in readers:
            reader.join()
        name, elapsed = backend.instance, time.monotonic() - begin
    left = [path.name for path in SHM_FOLDER.glob(f"{PREFIX}{name}*")]
    try:
        posix_ipc.MessageQueue(queue_name(name)).close()
        left.append(queue_name(name))
    except posix_ipc.ExistentialError:
        pass
    report.check("nothing is left behind", not left, f"{left}")
    return {
        "seconds": round(elapsed, 1),
        "requests": load.requests,
        "tokens": load.tokens,
        "aborted": load.aborted,
        "failed": dict(load.refused),
        "kills": dict(kills),
        "preemptions": stats.preemptions,
        "migrations": stats.migrations,
        "defragmentations": defragmentations,
        "pages_moved": moves,
        "prefix_cache_hit_rate": round(stats.prefix_cache_hit_rate, 3),
    }


def print_report(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_column()
    facts.add_column(justify="right")
    for name, value in result.items():
        words = name.replace("_", " ")
        if name in ("checks", "violations"):
            continue
        if isinstance(value, dict):
            facts.add_row(words, f"{sum(value.values()):,}")
            for kind, count in value.items():
                facts.add_row(f"  {kind}", f"{count:,}")
        else:
            facts.add_row(words, f"{value:,}" if name != "seed" else str(value))
    checks = Table("checked", box=None, pad_edge=False)
    for heading in ("times", "violations"):
        checks.add_column(heading, justify="right")
    for name, count in result["checks"].items():
        checks.add_row(name, f"{count:,}", f"{result['violations'].get(name, 0):,}")
    console = Console(highlight=False)
    console.print(facts)
    console.print()
    console.print(checks)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/stress kv", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--workers", type=int, default=4, help="worker processes; default: 4")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long; default: 30")
    parser.add_argument("--model", default=None, help="folder of a checkpoint; default: the model that ships")
    parser.add_argument("--seed", type=int, default=None, help="of requests and kills; default: another every time")
    parser.add_argument(
        "--publications", type=int, default=PUBLICATIONS, help=f"pages that G2 publishes; default: {PUBLICATIONS}"
    )
    parser.add_argument("--plant", action="store_true", help="violate an invariant on purpose; the run has to find it")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    if options.workers < 1 or options.seconds <= 0:
        parser.error("--workers has to be at least 1 and --seconds more than 0")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    report = Report()
    stop_in_order()
    try:
        check_publication(report, options.publications)
        result = stress(options, report)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except HotsetError as error:
        report.check("the instance lives", False, str(error))
        result = {}
    result |= {"seed": options.seed, "checks": dict(report.checks), "violations": dict(report.violations)}
    if options.json:
        print(json.dumps(result))
    else:
        print_report(result)
    for words in report.words[:20]:
        print(words, file=sys.stderr)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
