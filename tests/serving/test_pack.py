"""Packed models: aligned and checked blocks, packs that are killed, and bytes that are damaged afterwards."""

from __future__ import annotations

import fcntl
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from instances import PROMPTS, wait_until
from model_factory import make_model

from hotset.runtime import Backend, CorruptCheckpoint, ModelNotFound, RequestFailed, SamplingParams
from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.expert_formats import CannotPack
from hotset.runtime.model.pack import Packer
from hotset.runtime.model.pack_manifest import PackManifest
from hotset.shm.kv_page_format import KvFormat, decode

EXACT = SamplingParams(temperature=0, max_tokens=24, routing="off", ignore_eos=True)


def pack(model: Path, out: Path, format: str | None = None) -> Path:
    Packer(model, out, format).run(lambda finished: None)
    return out


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, ModelConfig.load(folder))


def test_a_packed_model_generates_the_same_text(tmp_path: Path) -> None:
    packed = pack(Path(TRAINED_MODEL), tmp_path / "packed")
    with Backend(workers=1, expert_budget="25%") as backend, Backend(packed, workers=1, expert_budget="25%") as other:
        assert other.generate(PROMPTS, EXACT) == backend.generate(PROMPTS, EXACT)


def test_every_expert_is_one_aligned_block(tmp_path: Path) -> None:
    packed = pack(make_model(tmp_path / "model"), tmp_path / "packed")
    checkpoint, manifest = opened(packed), PackManifest.of(packed)
    assert manifest is not None
    for layer in range(2):
        for expert in range(8):
            parts, block = checkpoint.expert(layer, expert).parts, manifest.experts[layer][expert]
            assert (parts[0].offset, sum(part.nbytes for part in parts)) == (block.offset, block.nbytes)
            assert block.offset % 4096 == 0
            ends = [part.offset + part.nbytes for part in parts]
            assert [part.offset for part in parts[1:]] == ends[:-1]


@pytest.mark.parametrize(("format", "bound"), [("bf16", 2**-8), ("q8_0", 0.01), ("q4_0", 0.15)])
def test_weights_are_converted_to_the_format(tmp_path: Path, format: str, bound: float) -> None:
    options = {"hidden_size": 64, "intermediate_size": 32, "dtype": "float32"}
    model = make_model(tmp_path / "model", **options)
    packed = pack(model, tmp_path / "packed", format)
    for part, original in zip(opened(packed).expert(1, 3).parts, opened(model).expert(1, 3).parts, strict=True):
        stored = np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset)
        expected = np.fromfile(original.file, np.float32, original.nbytes // 4, offset=original.offset)
        if format == "bf16":
            values = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = decode(stored.reshape(part.shape[0], -1), KvFormat(format), part.shape[1]).ravel()
        assert np.abs(values - expected).max() <= bound * np.abs(expected).max()


def test_a_quantised_model_is_served(tmp_path: Path) -> None:
    packed = pack(Path(TRAINED_MODEL), tmp_path / "packed", "q8_0")
    with Backend(packed, workers=1, expert_budget="25%") as backend:
        assert backend.plan.expert_nbytes == 26112
        assert len(backend.generate(PROMPTS[0], EXACT).token_ids) == 24


KILLED_IN_A_BLOCK = """
import os, signal, sys
from pathlib import Path
from hotset.runtime.model.pack import Packer
write, offsets = os.pwrite, []
def write_half_of_the_last(fd, data, offset):
    offsets.append(offset)
    if len(offsets) <= 70:
        return write(fd, data, offset)
    write(fd, data[: len(data) // 2], offset)
    os.kill(os.getpid(), signal.SIGKILL)
os.pwrite = write_half_of_the_last
Packer(Path(sys.argv[1]), Path(sys.argv[2]), "q4_0").run(lambda finished: None)
"""


def test_a_killed_pack_is_no_model_and_is_continued(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", num_experts=64, hidden_size=256, intermediate_size=256)
    whole, killed = pack(model, tmp_path / "whole", "q4_0"), tmp_path / "killed"
    done = subprocess.run([sys.executable, "-P", "-c", KILLED_IN_A_BLOCK, str(model), str(killed)], check=False)
    assert done.returncode == -signal.SIGKILL
    for _ in range(2):
        with pytest.raises(
            ModelNotFound, match="killed is a pack that was interrupted: the same `hotset pack` command"
        ):
            opened(killed)
        shutil.copyfile(model / "config.json", killed / "config.json")  # killed as late as may be
    begun_at: list[int] = []
    Packer(model, killed, "q4_0").run(begun_at.append)
    assert begun_at[0] == 70, "finished blocks are kept"
    for name in ("experts.bin", "dense.bin", "tensors.json", "manifest.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pack_that_is_interrupted_says_how_far_it_is_and_how_it_goes_on(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    model = make_model(tmp_path / "model", num_experts=64, hidden_size=512, intermediate_size=512, num_layers=4)
    out = tmp_path / "packed"
    command = [sys.executable, "-P", "-m", "hotset.runtime.cli", "pack", str(model), str(out), "--format", "q4_0"]
    packing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = out / "packing.journal"
    assert wait_until(lambda: journal.exists() and journal.stat().st_size > 16)
    packing.send_signal(number)
    _, errors = packing.communicate(timeout=30)
    assert packing.returncode == status
    finished = (journal.stat().st_size - 16) // 8
    said = re.search(rf"{out} has (\d+) of 256 experts; the same command goes on from there\n", errors)
    assert said and int(said[1]) in (finished, finished - 1)  # one may have been written and not yet counted


def test_what_cannot_be_written_is_named_and_what_is_known_at_once_is_said_without_a_bar(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "packed"
    command = [sys.executable, "-P", "-m", "hotset.runtime.cli", "pack", str(model), str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),  # as a disk that is full
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"hotset: {out / 'experts.bin'} cannot be written: File too large\n" in done.stderr
    assert f"{out} has 2 of 16 experts; the same command goes on from there\n" in done.stderr
    with (out / "packing.journal").open("rb") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == f"hotset: another process is packing into {out}\n"


def test_blocks_that_a_power_cut_has_spoiled_are_packed_again(tmp_path: Path) -> None:
    model, out = make_model(tmp_path / "model"), tmp_path / "packed"
    packer = Packer(model, out)

    class Killed(Exception):
        pass

    def kill_at_ten(finished: int) -> None:
        if finished == 10:
            raise Killed

    with pytest.raises(Killed):
        packer.run(kill_at_ten)
    with (out / "experts.bin").open("r+b") as file:
        file.seek(4 * packer.nbytes // packer.count)
        file.write(b"spoiled")
    begun_at: list[int] = []
    Packer(model, out).run(begun_at.append)
    assert begun_at[0] == 4
    assert (out / "experts.bin").read_bytes() == (pack(model, tmp_path / "other") / "experts.bin").read_bytes()


def test_a_damaged_block_fails_the_request_by_name_and_produces_no_token(tmp_path: Path) -> None:
    packed = pack(Path(TRAINED_MODEL), tmp_path / "packed")
    checkpoint = opened(packed)
    with (packed / "experts.bin").open("r+b") as file:
        for expert in range(32):
            part = checkpoint.expert(2, expert).parts[1]
            file.seek(part.offset + 5)
            file.write(bytes([0x11]))
    with Backend(packed, workers=1, expert_budget="25%") as backend:
        with pytest.raises(RequestFailed, match=r"expert \d+ of layer 2 cannot be loaded: .*experts\.bin at byte \d+"):
            backend.generate(PROMPTS[0], EXACT)
        assert backend.stats().decode_tokens == 0


def test_a_manifest_that_is_gone_is_missed(tmp_path: Path) -> None:
    packed = pack(make_model(tmp_path / "model"), tmp_path / "packed")
    (packed / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json is missing"):
        PackManifest.of(packed)


@pytest.mark.parametrize("format", ["bf17", "Q8_0"])
def test_an_unknown_format_is_refused(tmp_path: Path, format: str) -> None:
    with pytest.raises(ValueError, match=f"format is '{format}', expected one of bf16, q8_0, q4_0, mixed"):
        Packer(Path(TRAINED_MODEL), tmp_path / "packed", format)


def test_widths_that_no_block_fits_are_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", intermediate_size=24)
    with pytest.raises(CannotPack, match="32 and 24, q8_0 needs multiples of 32"):
        Packer(model, tmp_path / "packed", "q8_0")


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(CannotPack, match="is not empty"):
        pack(Path(TRAINED_MODEL), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(CannotPack, match="precious is a file, expected a folder"):
        pack(Path(TRAINED_MODEL), tmp_path / "precious")
    packed = pack(Path(TRAINED_MODEL), tmp_path / "packed")
    with pytest.raises(CannotPack, match="complete model already"):
        pack(Path(TRAINED_MODEL), packed)
