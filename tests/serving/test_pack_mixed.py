"""Packs of mixed precision: the more an expert was used, the finer its format; and the format travels with the slot."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from family_models import prompts
from in_process_model import InProcessModel
from model_factory import make_model

from hotset.runtime import Backend, RequestFailed, SamplingParams
from hotset.runtime.inspection import inspect_model
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.expert_formats import CannotPack, PrecisionTiers
from hotset.runtime.model.heat import Heat
from hotset.runtime.model.pack import Packer
from hotset.runtime.model.pack_manifest import EXPERTS_FILE, PackManifest
from hotset.shm.kv_page_format import KvFormat, decode
from hotset.workers.expert_store import ExpertStore, Int64
from hotset.workers.read_lanes import Load, ReadLanes

LAYERS, EXPERTS = 2, 10
COUNTS = np.arange(LAYERS * EXPERTS, dtype=np.uint64)[::-1].reshape(LAYERS, EXPERTS)  # the first is used most
GREEDY = SamplingParams(temperature=0, max_tokens=24, routing="off", ignore_eos=True)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_experts": EXPERTS}
    return make_model(tmp_path / "model", num_layers=LAYERS, dtype="float32", tokenizer=True, **sizes)


def record(model: Path, counts: np.ndarray = COUNTS) -> None:
    zeros = np.zeros(counts.shape)
    heat = Heat(
        instance="test",
        earlier=zeros.astype(np.uint64),
        current=counts,
        affinity=zeros.astype(np.float32),
        ranking=np.empty(0, np.int64),
    )
    heat.save(model)


def pack(model: Path, out: Path, **options: object) -> Path:
    Packer(model, out, "mixed", **options).run(lambda finished: None)  # type: ignore[arg-type]
    return out


def dtypes(folder: Path) -> list[str]:
    checkpoint = Checkpoint.open(folder)
    return [checkpoint.expert_dtype(*ids) for ids in checkpoint.expert_ids]


def test_formats_go_by_the_percentile_of_use(model: Path, tmp_path: Path) -> None:
    record(model)
    packed = pack(model, tmp_path / "packed")
    assert dtypes(packed) == ["bfloat16"] * 2 + ["q8_0"] * 12 + ["q4_0"] * 6
    manifest = PackManifest.of(packed)
    assert manifest is not None
    assert [expert.activations for expert in manifest.experts[1]] == list(range(9, -1, -1))


def test_tiers_may_be_set(model: Path, tmp_path: Path) -> None:
    record(model)
    packed = pack(model, tmp_path / "packed", tiers=PrecisionTiers(hot=0.5, cold=0.5))
    assert dtypes(packed) == ["bfloat16"] * 10 + ["q4_0"] * 10
    with pytest.raises(ValueError, match=r"cold is 0\.9 and hot is 0\.3, expected 0 <= cold <= hot <= 1"):
        PrecisionTiers(hot=0.3, cold=0.9)


@pytest.mark.parametrize(("stored", "finest"), [("float32", "bfloat16"), ("float16", "float16"), ("q8_0", "q8_0")])
def test_the_finest_format_is_no_finer_than_the_source(stored: str, finest: str) -> None:
    assert PrecisionTiers().dtype(0.95, stored) == finest
    assert PrecisionTiers().dtype(0.9, "q4_k") == "q8_0"
    assert PrecisionTiers().dtype(0.3, stored) == "q8_0"
    assert PrecisionTiers().dtype(0.29, stored) == "q4_0"


def test_weights_are_those_of_the_source(model: Path, tmp_path: Path) -> None:
    record(model)
    packed, source = Checkpoint.open(pack(model, tmp_path / "packed")), Checkpoint.open(model)
    for expert, bound in ((0, 2**-8), (5, 0.01), (9, 0.15)):
        layer = 1 if expert == 9 else 0
        for part, original in zip(packed.expert(layer, expert).parts, source.expert(layer, expert).parts, strict=True):
            stored = np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset).reshape(part.shape[0], -1)
            values = decode(stored, KvFormat(part.dtype), part.shape[1])
            expected = np.fromfile(original.file, np.float32, original.nbytes // 4, offset=original.offset)
            error = np.abs(values.ravel() - expected).max() / np.abs(expected).max()
            assert bound / 100 < error <= bound


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mixed_pack_computes_each_expert_in_its_format(workers: int, model: Path, tmp_path: Path) -> None:
    record(model)
    packed = pack(model, tmp_path / "packed")
    expected = [InProcessModel(packed).greedy(ids, GREEDY.max_tokens) for ids in prompts()]
    with Backend(packed, workers=workers, expert_budget="75%") as backend:
        assert len(backend.plan.geometry.slot_classes) == 3
        assert [answer.token_ids for answer in backend.generate([*prompts()], GREEDY)] == expected


def test_without_a_record_it_is_refused_with_what_to_do(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotPack, match=r"no use of its experts is recorded.* serve it for a while"):
        Packer(model, tmp_path / "packed", "mixed")
    record(model, np.zeros_like(COUNTS))
    with pytest.raises(CannotPack, match="no use of its experts is recorded"):
        Packer(model, tmp_path / "packed", "mixed")


def test_the_pack_whose_record_was_asked_for_and_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    Packer(model, tmp_path / "unserved", "q8_0").run(lambda finished: None)
    record(model)
    with pytest.raises(CannotPack, match=f"^{tmp_path / 'unserved'}: no use of its experts is recorded"):
        Packer(model, tmp_path / "packed", "mixed", heat_of=tmp_path / "unserved")


def test_the_use_of_another_pack_of_the_model_may_count(model: Path, tmp_path: Path) -> None:
    Packer(model, tmp_path / "served", "q8_0").run(lambda finished: None)
    record(tmp_path / "served")
    packed = pack(model, tmp_path / "packed", heat_of=tmp_path / "served")
    assert dtypes(packed)[:3] == ["bfloat16", "bfloat16", "q8_0"]


def test_serving_records_what_packing_goes_by(model: Path, tmp_path: Path) -> None:
    with Backend(model, workers=1) as backend:
        backend.generate([*prompts()], GREEDY)
    packed = pack(model, tmp_path / "packed")
    assert len(set(dtypes(packed))) == 3


def test_the_use_of_another_model_does_not_count(model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", num_layers=LAYERS, dtype="float32", tokenizer=True, seed=1)
    narrow = make_model(tmp_path / "narrow", num_layers=LAYERS, dtype="float32", tokenizer=True, hidden_size=64)
    for heat_of in (other, narrow):
        record(heat_of)
        with pytest.raises(CannotPack, match=f"{heat_of} is another model than {model}: their gates differ"):
            Packer(model, tmp_path / "packed", "mixed", heat_of=heat_of)


@pytest.mark.parametrize("option", [{"heat_of": Path("elsewhere")}, {"tiers": PrecisionTiers()}])
def test_options_of_mixed_are_refused_elsewhere(option: dict[str, object], model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format is 'q8_0', expected 'mixed' where heat or tiers are given"):
        Packer(model, tmp_path / "packed", "q8_0", **option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hot", "0.5"], "--hot is 0.5 and --format is not given, expected --format mixed: --hot is for that"),
        (
            ["--format", "q8_0", "--heat", "elsewhere"],
            "--heat is elsewhere and --format is q8_0, expected --format mixed: --heat is for that",
        ),
    ],
)
def test_the_command_names_the_option_that_is_for_mixed(
    arguments: list[str], sentence: str, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-P", "-m", "hotset.runtime.cli", "pack", str(model), str(tmp_path / "packed")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, f"hotset: {sentence}\n")


class Killed(Exception):
    pass


def kill_at_ten(finished: int) -> None:
    if finished == 10:
        raise Killed


@pytest.mark.parametrize(("counts", "first"), [(COUNTS, 10), (COUNTS[::-1], 0)])
def test_a_killed_pack_is_continued_only_with_the_same_record(
    counts: np.ndarray, first: int, model: Path, tmp_path: Path
) -> None:
    record(model)
    with pytest.raises(Killed):
        Packer(model, tmp_path / "packed", "mixed").run(kill_at_ten)
    record(model, np.ascontiguousarray(counts))
    begun_at: list[int] = []
    Packer(model, tmp_path / "packed", "mixed").run(begun_at.append)
    assert begun_at[0] == first
    whole = pack(model, tmp_path / "whole")
    for name in ("experts.bin", "tensors.json", "manifest.json"):
        assert (tmp_path / "packed" / name).read_bytes() == (whole / name).read_bytes()


@pytest.fixture
def packed(model: Path, tmp_path: Path) -> Iterator[Path]:
    record(model)
    yield pack(model, tmp_path / "packed")


@pytest.mark.parametrize("tier", ["bfloat16", "q8_0", "q4_0"])
def test_a_damaged_block_of_any_format_fails_the_request_by_name(tier: str, packed: Path) -> None:
    checkpoint = Checkpoint.open(packed)
    damaged = [ids for ids in checkpoint.expert_ids if checkpoint.expert_dtype(*ids) == tier]
    with (packed / "experts.bin").open("r+b") as file:
        for ids in damaged:
            file.seek(checkpoint.expert(*ids).parts[1].offset + 3)
            file.write(bytes([0x11, 0x22]))
    names = "|".join(f"expert {expert} of layer {layer} cannot be loaded" for layer, expert in damaged)
    with (
        Backend(packed, workers=1, expert_budget="60%") as backend,
        pytest.raises(RequestFailed, match=rf"({names}): .*experts\.bin at byte \d+"),
    ):
        for ids in prompts():
            backend.generate(ids, GREEDY)


class ShakyStore(ExpertStore):
    """Reads go wrong, without any error, as often as `damages` says: then they are of the file `damaged`."""

    def __init__(self, checkpoint: Checkpoint, damaged: Path) -> None:
        super().__init__(checkpoint)
        self.damages = 0
        self._damaged = os.open(damaged, os.O_RDONLY)

    def pieces(self, expert_id: int) -> tuple[Int64, Int64]:
        pieces, transposed = super().pieces(expert_id)
        if self.damages:
            self.damages -= 1
            pieces[:, 1] = self._damaged
        return pieces, transposed

    def close(self) -> None:
        super().close()
        os.close(self._damaged)


@pytest.mark.parametrize("tier", ["bfloat16", "q8_0", "q4_0"])
def test_damage_that_passes_is_read_over_once(tier: str, packed: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(packed)
    layer, expert = next(ids for ids in checkpoint.expert_ids if checkpoint.expert_dtype(*ids) == tier)
    slot = np.zeros(checkpoint.expert_nbytes, np.uint8)
    damaged = bytearray((packed / EXPERTS_FILE).read_bytes())
    for ids in checkpoint.expert_ids:
        damaged[checkpoint.expert(*ids).parts[0].offset] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    store = ShakyStore(checkpoint, tmp_path / "damaged")
    assert store.weight_format(layer * EXPERTS + expert).name.lower() == tier
    for damages, problem in ((1, None), (2, f"expert {expert} of layer {layer} cannot be loaded .* its checksum is")):
        store.damages = damages
        lanes = ReadLanes(store, [slot], 1)
        lanes.begin(Load(layer * EXPERTS + expert, 0, urgent=True))
        finished: list[Load] = []
        while not finished:  # a read that is to be repeated is finished for the lanes, not for us
            assert select.select([lanes.fd], [], [], 10)[0]
            finished = lanes.take_finished()
        (load,) = finished
        assert store.damages == 0
        assert load.error is None if problem is None else re.match(problem, str(load.error))
        lanes.close()
    store.close()


def test_inspect_shows_the_mix_and_the_sizes(packed: Path) -> None:
    lines = dict(enumerate(inspect_model(packed, ["4GiB"]).lines()))
    text = "\n".join(f"{name} {value}" for name, value in lines.values())
    for line in (
        "2 of 96.0 KiB, bfloat16, 19% of all use",
        "12 of 51.0 KiB, q8_0, 73% of all use",
        "6 of 27.0 KiB, q4_0, 8% of all use",
    ):
        assert line in text
