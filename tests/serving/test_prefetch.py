"""Prefetching while serving: the same text, what it fetches is used, and nothing is lost with those who ask."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from instances import PROMPTS

from hotset.runtime import Backend, SamplingParams
from hotset.runtime.commands import app
from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.model_cache import model_cache
from hotset.workers.prefetch.transitions import Transitions

GREEDY = SamplingParams(temperature=0, max_tokens=160, routing="off", ignore_eos=True)
EVERYTHING = "gate-ahead+gate-ahead-2+transitions+runners-up+affinity"


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with Backend(workers=1, expert_budget="25%", prefetch="off", warm_start=False) as backend:
        return [answer.token_ids for answer in backend.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("prefetch", ["gate-ahead", "transitions", EVERYTHING, "auto"])
def test_exact_text_does_not_depend_on_what_is_prefetched(prefetch: str, expected: list[list[int]]) -> None:
    with Backend(workers=1, expert_budget="25%", prefetch=prefetch, warm_start=False) as backend:
        assert [answer.token_ids for answer in backend.generate(PROMPTS, GREEDY)] == expected


def test_what_is_prefetched_is_used() -> None:
    """The shipped model, a quarter of its experts."""
    with Backend(workers=1, expert_budget="25%", routing="off", prefetch="gate-ahead", warm_start=False) as backend:
        params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
        backend.generate(PROMPTS[0], params)
        stats = backend.stats()
    [source] = stats.prefetch
    assert source.source == "gate-ahead"
    # How many of them are used depends on who else uses the disk and the processors: on what came too late.
    assert source.requests >= source.page_ins >= source.hits + source.late_hits > 0
    assert source.precision == (source.hits + source.late_hits) / source.page_ins
    assert 0 < source.recall < 1
    assert source.misses == stats.decode_expert_misses + stats.prefetch_hits


def test_the_end_of_a_launch_says_what_prefetching_was_worth(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompt", PROMPTS[0], "--workers", "1", "--expert-budget", "25%", "--ignore-eos", "--temperature", "0"]
    with pytest.raises(SystemExit) as done:
        app(["generate", *asked, "--max-tokens", "120", "--routing", "off", "--prefetch", "gate-ahead"])
    assert done.value.code == 0
    assert re.search(r"prefetch gate-ahead +\d+ of \d+ read, \d+ used \(\d", capsys.readouterr().out)


def test_what_transitions_learned_is_there_for_the_next_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokens = 0
    for _ in range(2):
        with Backend(workers=1, expert_budget="25%", routing="off", prefetch="transitions") as backend:
            backend.generate(PROMPTS[0], GREEDY)
            tokens += backend.stats().decode_tokens
    table = Transitions(range(4), 32)
    assert table.load(model_cache(TRAINED_MODEL) / "transitions")
    assert table._seen.sum() == pytest.approx(tokens * 3 * 4)  # pairs of layers x top-k, both instances


def test_without_prefetch_nothing_is_read_ahead(expected: list[list[int]]) -> None:
    with Backend(workers=1, expert_budget="25%", warm_start=False, prefetch="off") as backend:
        backend.generate(PROMPTS[0], GREEDY)
        stats = backend.stats()
    assert stats.prefetch == []
    assert stats.prefetch_page_ins == 0


def test_killed_workers_and_pagers_lose_no_answer(expected: list[list[int]]) -> None:
    with Backend(workers=2, expert_budget="25%", prefetch=EVERYTHING, warm_start=False) as backend:
        done = threading.Event()

        def kill() -> None:
            for turn in range(4):
                if done.wait(0.15):
                    return
                with suppress(ProcessLookupError):  # its successor has not begun
                    os.kill(backend.pager_pid if turn == 2 else backend.worker_pids[turn % 2], signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            answers = [answer.token_ids for answer in backend.generate(PROMPTS, GREEDY)]
            again = [answer.token_ids for answer in backend.generate(PROMPTS, GREEDY)]
        finally:
            done.set()
            killer.join()
        assert answers == again == expected
        time.sleep(0.1)
        stats = backend.stats()
        assert stats.worker_restarts + stats.pager_restarts > 0
