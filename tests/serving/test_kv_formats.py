"""Serving with KV pages of each format: memory to the byte, and the same text whatever happens to a sequence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest
from instances import PROMPTS, wait_until

from hotset.runtime import Backend, RequestFailed, SamplingParams
from hotset.runtime.config import TRAINED_MODEL, BackendConfig
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.plan import plan_instance

PARAMS = SamplingParams(temperature=0, max_tokens=80, routing="off", ignore_eos=True)
BFLOAT16_NAN = b"\xc0\x7f"


@pytest.mark.parametrize(
    ("kv_cache_dtype", "bytes_per_32"),
    [("float32", 128), ("float16", 64), ("bfloat16", 64), ("q8_0", 34), ("q4_0", 18)],
)
def test_A12_E1_the_plan_knows_a_page_to_the_byte(kv_cache_dtype: str, bytes_per_32: int) -> None:
    model = ModelConfig.load(TRAINED_MODEL)
    checkpoint = Checkpoint.open(TRAINED_MODEL, model)
    assert model.head_dim == 32
    page = model.num_layers * 2 * 16 * model.num_kv_heads * bytes_per_32
    config = BackendConfig(kv_cache_dtype=kv_cache_dtype, kv_cache_memory=7 * page + page - 1)  # type: ignore[arg-type]
    geometry = plan_instance(config, model, checkpoint).geometry
    assert (geometry.page_nbytes, geometry.num_pages) == (page, 7)


@pytest.mark.parametrize("kv_cache_dtype", ["float16", "q8_0"])
def test_shared_pages_preemption_and_a_killed_worker_do_not_show_in_the_text(kv_cache_dtype: str) -> None:
    system = "import os\nimport sys\n\n\nclass Handler:\n    def __init__(self, name):\n        self.name = name\n"
    prompts = [system + prompt for prompt in PROMPTS]
    with Backend(workers=1, kv_cache_dtype=kv_cache_dtype) as backend:
        page = backend.plan.geometry.page_nbytes
        expected = [backend.generate(prompt, PARAMS).token_ids for prompt in prompts]
        assert backend.generate(prompts[0], PARAMS).cached_tokens > 0
    with Backend(workers=2, kv_cache_dtype=kv_cache_dtype, kv_cache_memory=16 * page) as small:
        streams = [small.stream(prompt, PARAMS) for prompt in prompts]
        got = [next(stream).token_ids for stream in streams]
        os.kill(small.worker_pids[0], signal.SIGKILL)
        for tokens, stream in zip(got, streams, strict=True):
            for piece in stream:
                tokens.extend(piece.token_ids)
        assert got == expected
        assert wait_until(lambda: small.stats().worker_restarts == 1)
        assert small.stats().preemptions > 0


def model_without_a_number(folder: Path, token: int) -> Path:
    """The shipped model, but the embedding of `token` is not a number."""
    folder = Path(shutil.copytree(TRAINED_MODEL, folder))
    with (folder / "model.safetensors").open("r+b") as file:
        (header_nbytes,) = struct.unpack("<Q", file.read(8))
        embedding = json.loads(file.read(header_nbytes))["model.embed_tokens.weight"]
        assert embedding["dtype"] == "BF16"
        width = embedding["shape"][1]
        file.seek(8 + header_nbytes + embedding["data_offsets"][0] + token * width * 2)
        file.write(BFLOAT16_NAN * width)
    return folder


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "q8_0"])
def test_E8_a_row_that_pages_cannot_hold_fails_its_sequence_and_no_other(tmp_path: Path, kv_cache_dtype: str) -> None:
    bad = 2040
    good = [list(range(100 + 7 * number, 130 + 7 * number)) for number in range(3)]
    params = SamplingParams(temperature=0, max_tokens=24, routing="off", ignore_eos=True, logit_bias={bad: -100.0})
    with Backend(model_without_a_number(tmp_path / "model", bad), workers=1, kv_cache_dtype=kv_cache_dtype) as backend:
        expected = [backend.generate(prompt, params).token_ids for prompt in good]
        streams = [backend.stream(prompt, params) for prompt in [good[0], [5, 6, bad, 7], good[1], good[2]]]
        with pytest.raises(RequestFailed, match=r"position 2 of .* layer 0 .*model\.embed_tokens\.weight holds"):
            list(streams.pop(1))
        assert [[token for piece in stream for token in piece.token_ids] for stream in streams] == expected
        assert backend.stats().worker_restarts == 0
