"""The KV cache across processes: the cases of group G, and those of A to F that make sense with workers."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from forks import forked
from instances import PROMPTS, processes_of, queue_exists, segment_exists, wait_until

from hotset.runtime import Backend, BackendError, SamplingParams
from hotset.shm.geometry import Geometry
from hotset.shm.layout import Section
from hotset.shm.page_reader import PageReader, StalePage
from hotset.shm.segment import InstanceLock, Segment, remove_ipc_objects, remove_stale_instances

GREEDY = SamplingParams(temperature=0, max_tokens=24, routing="off", ignore_eos=True)
GEOMETRY = Geometry(
    num_layers=1, num_experts=8, num_pages=8, page_nbytes=4096, max_sequences=1, max_model_len=128, num_processes=2
)


@pytest.fixture
def segment() -> Iterator[Segment]:
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    lock = InstanceLock(name)
    created = Segment.create(name, GEOMETRY)
    try:
        yield created
    finally:
        created.close()
        remove_ipc_objects(name)
        lock.release()


def name_of(segment: Segment) -> str:
    assert segment.instance is not None
    return segment.instance


def test_G1_a_reader_sees_the_bytes_in_place_and_cannot_write_them(segment: Segment) -> None:
    pages = segment.view(Section.KV_PAGES)
    pages[7] = 42
    reader = PageReader(name_of(segment), GEOMETRY)
    page = reader.view(7)
    assert not page.flags.owndata
    mapping = np.frombuffer(reader._mmap, np.uint8).__array_interface__["data"][0]
    assert mapping <= page.__array_interface__["data"][0] < mapping + segment.layout.nbytes
    assert (page == 42).all()
    with pytest.raises(ValueError, match="read-only"):
        page[0] = 1
    pages[7, 0] = 43
    assert page[0] == 43 and (page[1:] == 42).all()


def _fill_and_publish(name: str, rounds: int) -> None:
    segment = Segment.attach(name, GEOMETRY)
    page = segment.view(Section.KV_PAGES)[1].view(np.uint64)
    for number in range(1, rounds + 1):
        page[:] = number
        segment.arena.store_u64(Section.SEQUENCES, 0, 0, number)
        while (
            segment.arena.load_u64(Section.COUNTERS, 0, 0) + segment.arena.load_u64(Section.COUNTERS, 1, 0) < 2 * number
        ):
            os.sched_yield()  # until both readers have looked


def _verify(name: str, reader: int, rounds: int) -> None:
    segment = Segment.attach(name, GEOMETRY)
    page = segment.view(Section.KV_PAGES)[1].view(np.uint64)
    for number in range(1, rounds + 1):
        while segment.arena.load_u64(Section.SEQUENCES, 0, 0) < number:
            os.sched_yield()
        assert (page == number).all()
        segment.arena.store_u64(Section.COUNTERS, reader, 0, number)


def test_G2_what_is_published_is_whole(segment: Segment) -> None:
    rounds = 2_000  # 100,000 in scripts/stress kv
    name = name_of(segment)
    readers = [functools.partial(_verify, name, reader, rounds) for reader in range(2)]
    with forked(*readers, functools.partial(_fill_and_publish, name, rounds)):
        pass


def test_G3_a_reader_that_kept_a_page_learns_that_it_was_handed_out_again() -> None:
    # Eight pages: the second prompt has to take those of the first.
    with Backend(workers=1, max_model_len=128) as probe:
        page_nbytes = probe.plan.geometry.page_nbytes
    with Backend(workers=2, max_model_len=128, kv_cache_memory=8 * page_nbytes) as backend:
        reader = PageReader(backend.instance, backend.plan.geometry)
        backend.generate(PROMPTS[0], GREEDY)
        kept = {page: reader.generation(page) for page in range(1, 9) if reader.generation(page)}
        bytes_before = {page: reader.read(page, generation) for page, generation in kept.items()}
        assert kept
        backend.generate("x = 1\n" * 20, SamplingParams(temperature=0, max_tokens=20, routing="off", ignore_eos=True))
        told = 0
        for page, generation in kept.items():
            try:
                assert reader.read(page, generation) == bytes_before[page]
            except StalePage as error:
                told += 1
                assert error.current > error.kept == generation
        assert told > 0


def test_G4_pins_and_unpublished_pages_of_a_killed_worker_come_back() -> None:
    with Backend(workers=2, expert_budget="25%") as backend:
        endless = SamplingParams(temperature=0, max_tokens=900, routing="off", ignore_eos=True)
        streams = [backend.stream(prompt, endless) for prompt in PROMPTS[:2]]
        for stream in streams:
            next(stream)
        # Stopped in the middle of a step, and its pins set as far as its row goes: a wait that never ends.
        victim = backend.worker_pids[0]
        os.kill(victim, signal.SIGSTOP)
        assert wait_until(lambda: " T " in Path(f"/proc/{victim}/stat").read_text())
        segment = Segment.attach(backend.instance, backend.plan.geometry)
        for pin in range(segment.layout.geometry.pins_per_process):
            segment.arena.want(0, pin, pin)
        os.kill(victim, signal.SIGKILL)
        assert wait_until(lambda: backend.stats().worker_restarts == 1)
        assert backend.stats().pins_reclaimed >= segment.layout.geometry.pins_per_process - 1
        for stream in streams:
            next(stream)
            stream.close()
        assert wait_until(lambda: backend.stats().kv_pages_used == 0)
        segment.close()


ATTACH = """
import sys, msgspec
from hotset.shm.geometry import Geometry
from hotset.shm.segment import Segment
segment = Segment.attach(sys.argv[1], msgspec.json.decode(sys.argv[2], type=Geometry))
segment.arena.resident_experts()
"""


def test_G5_processes_that_come_and_go_leave_the_arena_as_it_is() -> None:
    import msgspec

    backend = Backend(workers=2)
    geometry = msgspec.json.encode(backend.plan.geometry).decode()
    for _ in range(10):
        subprocess.run([sys.executable, "-P", "-c", ATTACH, backend.instance, geometry], check=True)
        assert backend.generate(PROMPTS[0], SamplingParams(max_tokens=2)).token_ids
    pids = [backend.coordinator_pid, backend.pager_pid, *backend.worker_pids]
    os.kill(backend.coordinator_pid, signal.SIGKILL)
    with pytest.raises(BackendError):
        backend.generate(PROMPTS[0])
    assert wait_until(lambda: not processes_of(pids) and not segment_exists(backend.instance))
    assert not queue_exists(backend.instance)
    backend.close()


ABANDONED = """
import os, signal, sys
import numpy as np
from hotset.shm.geometry import Geometry
from hotset.shm.layout import HEADER
from hotset.shm.segment import SHM_FOLDER, InstanceLock, Segment, segment_name
lock = InstanceLock(sys.argv[1])
segment = Segment.create(sys.argv[1], Geometry(num_layers=1, num_experts=8))
# As it looks once the pid belongs to another process: the one that starts us.
np.memmap(SHM_FOLDER / segment_name(sys.argv[1]).lstrip("/"), HEADER, "r+", shape=1)["creator_pid"] = os.getppid()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_G6_an_instance_whose_pid_another_process_has_is_still_known_to_be_dead() -> None:
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    died = subprocess.run([sys.executable, "-P", "-c", ABANDONED, name], check=False)
    assert died.returncode == -signal.SIGKILL
    assert segment_exists(name)
    assert name in remove_stale_instances()
    assert not segment_exists(name)


def test_G7_an_arena_larger_than_dev_shm_is_refused_at_start() -> None:
    space = os.statvfs("/dev/shm")
    with pytest.raises(BackendError, match=r"needs \d+ bytes .* has \d+ bytes free"):
        Backend(kv_cache_memory=space.f_bavail * space.f_frsize + 2**30)
    assert not list(Path("/dev/shm").glob(f"hotset.{os.getpid()}-*"))


def test_C6_generated_tokens_are_reused_too() -> None:
    with Backend(workers=2) as backend:
        first = backend.generate(
            PROMPTS[0], SamplingParams(temperature=0, max_tokens=60, routing="off", ignore_eos=True)
        )
        ids = [*backend.tokenizer.encode(PROMPTS[0]).tolist(), *first.token_ids]
        again = backend.generate(ids, GREEDY)
        assert again.cached_tokens == (len(ids) - 1) // 16 * 16


def test_C2_prompts_that_run_at_the_same_time_share_pages_across_workers() -> None:
    with Backend(workers=2) as backend:
        system = "class Service:\n    def __init__(self, name):\n        self.name = name\n" * 12
        backend.generate(system, SamplingParams(max_tokens=1, routing="off"))
        blocks = len(backend.tokenizer.encode(system)) // 16
        params = SamplingParams(temperature=0, max_tokens=40, routing="off", ignore_eos=True)
        backend.generate([system + question for question in ("def a(", "def b(", "def c(", "def d(")], params)
        # Each needs four pages of its own at the end.
        assert blocks < backend.stats().kv_pages_peak <= blocks + 4 * 4 < 4 * blocks


def test_F1_pages_are_moved_while_sequences_are_served_and_their_text_is_the_same() -> None:
    params = SamplingParams(temperature=0, max_tokens=200, routing="off", ignore_eos=True)
    with Backend(workers=2) as backend:
        expected = [answer.token_ids for answer in backend.generate(PROMPTS, params)]
    with Backend(workers=2) as backend:
        others = [backend.stream(f"x = {number}\n" * 12, params) for number in range(4)]
        streams = [backend.stream(prompt, params) for prompt in PROMPTS]
        got = [next(stream).token_ids for stream in streams]
        for stream in others:
            next(stream)
            stream.close()
        moved = backend.defragment(max_moves=2)
        assert moved <= 2
        moved += backend.defragment()
        assert moved > 0
        for tokens, stream in zip(got, streams, strict=True):
            for piece in stream:
                tokens.extend(piece.token_ids)
        assert got == expected
        assert backend.defragment() >= 0 and backend.defragment() == 0


def test_a_sequence_moves_to_an_idle_worker_and_its_text_is_the_same() -> None:
    long = SamplingParams(temperature=0, max_tokens=400, routing="off", ignore_eos=True)
    with Backend(workers=2) as backend:
        expected = [backend.generate(PROMPTS[number], long).token_ids for number in (0, 2)]
        streams = [backend.stream(PROMPTS[number], long) for number in range(4)]
        tokens = [next(stream).token_ids for stream in streams]
        for number in (1, 3):  # both of one worker, which then is idle
            streams[number].close()
        for number in (0, 2):
            for piece in streams[number]:
                tokens[number] += piece.token_ids
        assert [tokens[0], tokens[2]] == expected
        assert backend.stats().migrations >= 1
