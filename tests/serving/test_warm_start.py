"""An instance begins with the experts that the last one had, and they count as nobody's hits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from instances import wait_until
from model_factory import make_model
from pager_alone import WORKER, PagerAlone

from hotset.runtime import Backend, SamplingParams
from hotset.runtime.affinity import AffinityConfig, ExpertAffinity
from hotset.runtime.messages.message import StopWorking
from hotset.runtime.messages.pager import WarmStartProblem
from hotset.runtime.model.heat import Heat
from hotset.shm.counters import Counter
from hotset.shm.paging_queue import PagingDirection, PagingMessage, PagingPriority

SHAPE = (1, 16)  # of the model below; eight slots


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_model(folder, num_layers=1, num_experts=16, experts_per_token=4)


@contextmanager
def pager_of(folder: Path, **settings: object) -> Iterator[PagerAlone]:
    pager = PagerAlone(folder, **settings)
    try:
        yield pager
    finally:
        pager.close()


def use(pager: PagerAlone, *experts: int) -> None:
    """As a worker does: the experts are activated, and are in memory afterwards."""
    affinity = ExpertAffinity(AffinityConfig(16), segment=pager.instance.segment, process=WORKER)
    affinity.update(experts)
    pager.access.note_demand(0, np.array([experts], np.int32))
    for _ in pager.access.resident(0, experts):
        pass


def residents(pager: PagerAlone) -> set[int]:
    return set(pager.arena.resident_experts())


def write_heat(folder: Path, ranking: list[int]) -> None:
    zero = np.zeros(SHAPE, np.uint64)
    affinity = np.zeros(SHAPE, np.float32)
    Heat(instance="", earlier=zero, current=zero, affinity=affinity, ranking=np.array(ranking)).save(folder)


def test_the_next_instance_has_what_the_last_one_had(folder: Path) -> None:
    with pager_of(folder) as first:
        use(first, 2, 3, 5, 7, 11, 13)
        use(first, 3, 13)
        assert first.count(Counter.WARM_PAGE_INS) == 0
    heat = Heat.load(folder, SHAPE)
    assert heat is not None
    assert heat.activations[0].tolist() == [0, 0, 1, 2, 0, 1, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0]
    assert set(heat.ranking[:2].tolist()) == {3, 13} and set(heat.ranking.tolist()) == {2, 3, 5, 7, 11, 13}
    with pager_of(folder) as second:
        assert wait_until(lambda: residents(second) == {2, 3, 5, 7, 11, 13})
        assert all(second.has_the_right_bytes(expert) for expert in residents(second))
        assert second.count(Counter.WARM_PAGE_INS) == 6
        use(second, 2, 3)
        assert second.count(Counter.DECODE_EXPERT_HITS) == 2
        assert second.count(Counter.PREFETCH_HITS) == second.count(Counter.PREFETCH_PAGE_INS) == 0
        assert second.count(Counter.URGENT_PAGE_INS) == 0
    heat = Heat.load(folder, SHAPE)
    assert heat is not None
    assert heat.activations[0, [2, 3, 13]].tolist() == [2, 3, 2], "counts of both instances"


def test_only_empty_slots_are_filled_and_the_best_come_first(folder: Path) -> None:
    write_heat(folder, list(range(15, -1, -1)))
    with pager_of(folder) as pager:
        assert wait_until(lambda: len(residents(pager)) == 8)
        assert residents(pager) == set(range(8, 16))
        use(pager, 0)
        assert wait_until(lambda: not pager.loading())
        assert len(residents(pager)) == 8 and pager.count(Counter.WARM_PAGE_INS) == 8


def test_a_pager_that_is_killed_counts_nothing_twice(folder: Path) -> None:
    with pager_of(folder) as pager:
        use(pager, 1, 2)
        pager.kill()
        pager.start()
        use(pager, 1, 4)
    heat = Heat.load(folder, SHAPE)
    assert heat is not None and heat.activations[0, :5].tolist() == [0, 2, 1, 0, 1]


def test_what_is_paged_out_is_not_fetched_again(folder: Path) -> None:
    write_heat(folder, [4])
    with pager_of(folder) as pager:
        assert wait_until(lambda: residents(pager) == {4})
        pager.queue.send(PagingMessage(0, [4], PagingDirection.OUT, PagingPriority.NORMAL))
        assert wait_until(lambda: not residents(pager))
        use(pager, 5)
        assert residents(pager) == {5}


def test_without_a_warm_start_the_file_is_neither_read_nor_written(folder: Path) -> None:
    write_heat(folder, [4])
    before = Heat.path(folder).read_bytes()
    with pager_of(folder, warm_start=False) as pager:
        use(pager, 5)
        assert residents(pager) == {5}
    assert Heat.path(folder).read_bytes() == before


def test_a_damaged_file_is_ignored_with_a_reason_and_replaced() -> None:
    params = SamplingParams(max_tokens=4, temperature=0)
    with Backend(workers=1) as backend:
        text = backend.generate("def", params).text
        assert backend.stats().warm_start_problem is None
    path = Heat.path(Path(backend.config.model))
    path.write_bytes(b"damaged")
    with Backend(workers=1) as backend:
        assert backend.generate("def", params).text == text
        stats = backend.stats()
    assert "is ignored" in (stats.warm_start_problem or "") and stats.warm_page_ins == 0
    assert path.stat().st_size > 100
    with Backend(workers=1) as backend:
        assert wait_until(lambda: backend.stats().warm_page_ins > 0)


def test_a_file_that_cannot_be_written_is_a_reason_and_no_error(folder: Path) -> None:
    (Heat.path(folder) / "in the way").mkdir(parents=True)
    pager = PagerAlone(folder)
    try:
        use(pager, 3)
        pager.child.channel.send(StopWorking())
        for problem in ("is ignored", "cannot be written"):
            message = pager.child.channel.wait()
            assert isinstance(message, WarmStartProblem) and problem in message.reason
    finally:
        pager.close()
