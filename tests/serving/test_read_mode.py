"""Experts read past the page cache, and why they are or are not."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from instances import wait_until
from model_factory import make_model
from pager_alone import PagerAlone

from hotset.runtime import Backend, BackendError, SamplingParams
from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.model_cache import model_cache
from hotset.runtime.model.pack import Packer
from hotset.shm.counters import Counter
from hotset.workers import read_mode
from hotset.workers.read_mode import CannotReadDirectly, ReadRates, choose_read_mode

NOT_PACKED = "aligned blocks, which `hotset pack` writes"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    shutil.copy(TRAINED_MODEL / "tokenizer.json", folder)
    odd_size = 888  # no whole number of pages
    sizes = {"num_experts": 16, "experts_per_token": 4, "hidden_size": 256, "intermediate_size": odd_size}
    return make_model(folder, num_layers=1, **sizes)


@pytest.fixture(scope="module")
def packed(plain: Path) -> Path:
    folder = plain.parent / f"{plain.name}-packed"
    Packer(plain, folder).run(lambda finished: None)
    checkpoint = opened(folder)
    if (problem := read_mode._direct_problem(checkpoint)) is not None:
        pytest.skip(f"no O_DIRECT here: {problem}")
    return folder


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, ModelConfig.load(folder))


def test_experts_read_directly_are_the_same_and_none_comes_from_the_page_cache(packed: Path) -> None:
    pager = PagerAlone(packed, read_mode="direct", warm_start=False)
    try:
        for expert, _ in pager.access.resident(0, range(16)):
            assert pager.has_the_right_bytes(expert)
        assert pager.count(Counter.DISK_PAGE_INS) == 16 and pager.count(Counter.PAGE_CACHE_PAGE_INS) == 0
    finally:
        pager.close()


def test_what_the_kernel_counts_is_reported(packed: Path) -> None:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    texts: list[list[int]] = []
    for mode in ("direct", "buffered"):
        with Backend(packed, workers=1, warm_start=False, routing="off", read_mode=mode) as backend:
            texts.append(backend.generate([1, 2, 3], params).token_ids)
            stats = backend.stats()
            assert (stats.read_mode, stats.read_mode_reason) == (mode, "asked for")
            if mode == "direct":
                assert stats.disk_bytes_read >= stats.bytes_read > 0
                backend.reset_stats()
                assert wait_until(lambda backend=backend: backend.stats().disk_bytes_read == 0)
            else:
                assert stats.disk_bytes_read < stats.bytes_read, "the pack has just been written"
    assert texts[0] == texts[1]


def test_a_model_that_is_not_packed_is_read_through_the_page_cache_and_says_so(plain: Path) -> None:
    with pytest.raises(CannotReadDirectly, match=NOT_PACKED):
        choose_read_mode("direct", opened(plain), 4)
    with Backend(plain, workers=1) as backend:
        stats = backend.stats()
        assert stats.read_mode == "buffered" and NOT_PACKED in stats.read_mode_reason
    with pytest.raises(BackendError, match=NOT_PACKED):
        Backend(plain, workers=1, read_mode="direct")


def test_what_the_page_cache_can_hold_is_not_measured(packed: Path) -> None:
    chosen = choose_read_mode("auto", opened(packed), 4)
    assert not chosen.direct and "can hold all experts" in chosen.reason
    assert not (model_cache(packed) / read_mode.RATES_FILE).exists()


def test_rates_are_measured_once_and_the_faster_way_is_taken(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_mode, "available_memory", lambda: 0)
    checkpoint, path = opened(packed), model_cache(packed) / read_mode.RATES_FILE
    choose_read_mode("auto", checkpoint, 4)
    rates = msgspec.json.decode(path.read_bytes(), type=ReadRates)
    assert rates.buffered > 0 and rates.direct > 0
    for buffered, direct in ((1e9, 2e9), (2e9, 1e9), (1e9, 1.05e9)):
        path.write_bytes(msgspec.json.encode(ReadRates(rates.device, buffered, direct)))
        chosen = choose_read_mode("auto", checkpoint, 4)
        assert chosen.direct == (direct == 2e9) and f"{direct / 1e6:.0f} MB/s direct" in chosen.reason
    path.write_bytes(msgspec.json.encode(ReadRates(rates.device + 1, 1.0, 2.0)))
    choose_read_mode("auto", checkpoint, 4)
    assert msgspec.json.decode(path.read_bytes(), type=ReadRates).device == rates.device
