"""Models whose experts are of two sizes: each goes into a slot of its own size, with its own format, and nobody waits
for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import prompts
from in_process_model import InProcessModel
from instances import wait_until
from model_factory import make_model
from pager_alone import WORKER, PagerAlone
from safetensors.numpy import load_file, save_file

from hotset.runtime import Backend, BudgetTooSmall, SamplingParams
from hotset.shm.geometry import SlotClass
from hotset.shm.layout import Section, WeightFormat
from hotset.shm.paging_queue import PagingMessage

LARGE, SMALL = 3 * 128 * 128 * 4, 3 * 128 * 128 * 2
COORDINATOR = WORKER + 2


def make_mixed_model(folder: Path, **options: Any) -> Path:
    """Experts with odd numbers are float32, those with even ones float16."""
    sizes = {"num_experts": 16, "experts_per_token": 4, "hidden_size": 128, "intermediate_size": 128, **options}
    make_model(folder, dtype="float32", tokenizer=True, **sizes)
    tensors: dict[str, Any] = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        expert = name.partition(".experts.")[2].partition(".")[0]
        if expert and int(expert) % 2 == 0:
            tensors[name] = values.astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def pager(tmp_path: Path) -> Iterator[PagerAlone]:
    pager = PagerAlone(make_mixed_model(tmp_path / "model", num_layers=1), expert_budget=5 * (LARGE + SMALL))
    yield pager
    pager.close()


def test_slots_are_of_the_sizes_of_the_experts(tmp_path: Path) -> None:
    folder = make_mixed_model(tmp_path / "model")
    with Backend(folder, workers=1, expert_budget="50%") as backend:
        assert backend.plan.geometry.slot_classes == (SlotClass(8, LARGE), SlotClass(8, SMALL))
        assert backend.plan.memory.experts == 8 * (LARGE + SMALL)
        backend.generate("def f(x):", SamplingParams(max_tokens=32, ignore_eos=True))
        stats = backend.stats()
        assert 0 < stats.resident_expert_bytes <= stats.expert_budget_bytes == 8 * (LARGE + SMALL)


def test_every_expert_has_its_own_bytes_and_format_in_a_slot_of_its_size(pager: PagerAlone) -> None:
    slots, info = pager.instance.segment.slots(), pager.instance.segment.view(Section.SLOT_INFO)
    for expert, slot in pager.access.resident(0, [*range(16), *range(15, -1, -1)]):
        assert pager.has_the_right_bytes(expert)
        nbytes, format = (LARGE, WeightFormat.FLOAT32) if expert % 2 else (SMALL, WeightFormat.FLOAT16)
        assert len(slots[slot]) == nbytes
        assert (info[slot, 0]["nbytes"], info[slot, 0]["format"]) == (nbytes, format)


def test_an_expert_whose_slots_are_all_pinned_does_not_hold_up_one_of_another_size(pager: PagerAlone) -> None:
    pinned = [1, 3, 5, 7, 9]
    for expert, _ in pager.access.resident(0, pinned):
        assert expert in pinned
    for pin, expert in enumerate(pinned[:4]):
        assert pager.arena.want(WORKER, pin, expert) >= 0
    assert pager.arena.want(COORDINATOR, 0, pinned[4]) >= 0
    for expert in (11, 4):
        pager.arena.request_urgent(expert)
    pager.queue.send(PagingMessage(0, [11, 4]))
    assert wait_until(lambda: pager.arena.find(4) >= 0)
    assert pager.arena.find(11) < 0
    pager.arena.unpin_all(WORKER)
    assert wait_until(lambda: pager.arena.find(11) >= 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_smallest_legal_pool_serves_the_same_text(workers: int, tmp_path: Path) -> None:
    folder = make_mixed_model(tmp_path / "model", vocab_size=260)
    model = InProcessModel(folder)
    greedy = SamplingParams(temperature=0, max_tokens=24, routing="off", ignore_eos=True)
    expected = [model.greedy(ids, 24) for ids in prompts()]
    least = 4 * workers + 1
    with pytest.raises(BudgetTooSmall) as refusal:
        Backend(folder, workers=workers, expert_budget=least * (LARGE + SMALL) - 1)
    assert refusal.value.needed == 2 * least
    with Backend(folder, workers=workers, expert_budget=least * (LARGE + SMALL)) as backend:
        assert backend.plan.geometry.slot_classes == (SlotClass(least, LARGE), SlotClass(least, SMALL))
        assert [answer.token_ids for answer in backend.generate([*prompts()], greedy)] == expected
