"""Instances whose KV pages hold latent vectors: several sequences, few pages, a killed worker, other page formats."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from family_models import make_family_model, prompts
from in_process_model import InProcessModel
from instances import wait_until

from hotset.runtime import Backend, SamplingParams
from hotset.shm.kv_page_format import KvFormat

PARAMS = SamplingParams(temperature=0, max_tokens=100, routing="off", ignore_eos=True)


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "q8_0"])
def test_few_pages_and_a_killed_worker_do_not_show_in_the_text(tmp_path: Path, kv_cache_dtype: str) -> None:
    folder = make_family_model(tmp_path / "model", "deepseek_v2 as V2-Lite", dtype="bfloat16")
    several = [ids[start : start + 40] for ids in prompts() for start in (0, 16)]
    model = InProcessModel(folder, kv_format=KvFormat(kv_cache_dtype))
    expected = [model.greedy(ids, PARAMS.max_tokens) for ids in several]
    page = model.config.kv_page_layout(16, KvFormat(kv_cache_dtype)).page_nbytes
    with Backend(folder, workers=2, kv_cache_dtype=kv_cache_dtype, kv_cache_memory=16 * page) as backend:
        assert backend.plan.geometry.num_pages == 16
        streams = [backend.stream(ids.tolist(), PARAMS) for ids in several]
        got = [next(stream).token_ids for stream in streams]
        os.kill(backend.worker_pids[0], signal.SIGKILL)
        for tokens, stream in zip(got, streams, strict=True):
            for piece in stream:
                tokens.extend(piece.token_ids)
        assert got == expected
        assert wait_until(lambda: backend.stats().worker_restarts == 1)
        assert backend.stats().preemptions > 0
        first, again = (backend.generate(several[0].tolist(), PARAMS) for _ in range(2))
        assert again.cached_tokens > 0, "its pages were shared"
        assert first.token_ids == again.token_ids == expected[0]
        assert backend.check_cache() is None


@pytest.mark.parametrize("routing", ["resnorm", "range", "mass", "bonus"])
def test_a_gate_of_sigmoids_routes_with_a_preference(tmp_path: Path, routing: str) -> None:
    folder = make_family_model(tmp_path / "model", "deepseek_v3", dtype="bfloat16")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with Backend(folder, workers=1, expert_budget="50%", routing=routing) as backend:
        assert len(backend.generate(prompts()[0].tolist(), params).token_ids) == 40
        assert backend.stats().lost_mass > 0
