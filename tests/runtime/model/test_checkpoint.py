"""Finding every tensor of a checkpoint, and refusing damaged ones with the name of the file and the tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_factory import make_model, tensor_shapes
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from hotset.runtime.model.tensors import dense_tensors

Header = dict[str, Any]


def edit_header(path: Path, edit: Callable[[Header], None]) -> None:
    """Rewrite the header of a safetensors file; the data stays."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_what_the_safetensors_library_reads(tmp_path: Path, dtype: str, shards: int) -> None:
    folder = make_model(tmp_path / "model", dtype=dtype, shards=shards, num_kv_heads=2)
    checkpoint = Checkpoint.open(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    compared = 0
    for file in files:
        with safe_open(file, framework="numpy") as library:
            for name in library.keys():  # noqa: SIM118
                expected = library.get_tensor(name)
                location = checkpoint.tensors[name]
                assert location.file == file
                values = np.fromfile(file, expected.dtype, expected.size, offset=location.offset)
                np.testing.assert_array_equal(values.reshape(location.shape), expected)
                if name in dense_tensors(checkpoint.config):
                    np.testing.assert_array_equal(checkpoint.dense(name), expected)
                compared += 1
    assert compared == len(list(tensor_shapes(json.loads((folder / "config.json").read_text()))))


def test_bfloat16_comes_as_its_bits(tmp_path: Path) -> None:
    bits = Checkpoint.open(make_model(tmp_path / "a", dtype="bfloat16", seed=3)).dense("model.norm.weight")
    floats = Checkpoint.open(make_model(tmp_path / "b", dtype="float32", seed=3)).dense("model.norm.weight")
    assert bits.dtype == np.uint16
    np.testing.assert_array_equal(bits, floats.view(np.uint32) >> 16)


def test_an_expert_is_gate_up_down_and_a_slot_holds_all_three(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    expert = checkpoint.expert(1, 5)
    names = ("gate_proj", "up_proj", "down_proj")
    assert [part.shape for part in expert.parts] == [(24, 32), (24, 32), (32, 24)]
    for part, name in zip(expert.parts, names, strict=True):
        assert part == checkpoint.tensors[f"model.layers.1.mlp.experts.5.{name}.weight"]
    assert checkpoint.expert_nbytes == expert.nbytes == 3 * 24 * 32 * 4
    assert checkpoint.expert_dtype(1, 3) == "float32"


def test_an_expert_is_found_in_stacked_tensors_too(folder: Path, tmp_path: Path) -> None:
    """gate above up and all experts behind one another, as transformers 5 keeps them."""
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gates, ups, downs = (
            np.stack([tensors.pop(f"{prefix}.{expert}.{matrix}_proj.weight") for expert in range(8)])
            for matrix in ("gate", "up", "down")
        )
        tensors |= {f"{prefix}.gate_up_proj": np.concatenate([gates, ups], 1), f"{prefix}.down_proj": downs}
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file(tensors, stacked / "model.safetensors")
    shutil.copy(folder / "config.json", stacked)

    def content(of: Path) -> list[bytes]:
        checkpoint = Checkpoint.open(of)
        parts = [part for layer in range(2) for expert in range(8) for part in checkpoint.expert(layer, expert).parts]
        assert [part.shape for part in parts[:3]] == [(24, 32), (24, 32), (32, 24)]
        return [part.file.read_bytes()[part.offset : part.offset + part.nbytes] for part in parts]

    assert content(stacked) == content(folder)
    del tensors["model.layers.1.mlp.experts.down_proj"]
    save_file(tensors, stacked / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"has no tensor model\.layers\.1\.mlp\.experts\.down_proj"):
        Checkpoint.open(stacked)


def test_dense_weights_are_a_shared_read_only_mapping(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    values = checkpoint.dense("lm_head.weight")
    assert not values.flags.writeable
    assert not values.flags.owndata
    start, end = values.ctypes.data, values.ctypes.data + values.nbytes
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    places = {tuple(int(bound, 16) for bound in place.split("-")): mode for place, mode, *_ in maps}
    assert [mode for (low, high), mode in places.items() if low <= start and end <= high] == ["r--s"]


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint.open(folder).tensors


def test_tensors_that_no_part_needs_may_be_of_any_kind(folder: Path) -> None:
    def add(header: Header) -> None:
        header["rotary.inv_freq"] = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}

    edit_header(folder / "model.safetensors", add)
    Checkpoint.open(folder)


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.experts.7.down_proj.weight"])
def test_a_missing_tensor_is_named(folder: Path, missing: str) -> None:
    edit_header(folder / "model.safetensors", lambda header: header.pop(missing))
    with pytest.raises(CorruptCheckpoint, match=missing) as caught:
        Checkpoint.open(folder)
    assert caught.value.tensor == missing


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.experts.3.gate_proj.weight"]
)
def test_a_wrong_shape_is_named_with_both_shapes(folder: Path, name: str) -> None:
    def flatten(header: Header) -> None:
        header[name]["shape"] = [1, int(np.prod(header[name]["shape"]))]

    edit_header(folder / "model.safetensors", flatten)
    with pytest.raises(CorruptCheckpoint, match=r"shape \[1, \d+\].* needs \[\d+, 32\]") as caught:
        Checkpoint.open(folder)
    assert caught.value.path == folder / "model.safetensors"
    assert caught.value.tensor == name


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"truncated.*{len(content) - 1}") as caught:
        Checkpoint.open(folder)
    assert caught.value.path == path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\0",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", 50) + b"{}",
        b"version https://git-lfs.github.com/spec",
    ],
)
def test_a_file_without_a_header_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="not a safetensors file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", [b"[1, 2]", b"{\xff\xff}", b'{"a": 7}', b'{"a": {"dtype": "F32"}}'])
def test_a_header_of_nonsense_is_refused(folder: Path, text: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CorruptCheckpoint, match="header"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("offsets", [[8, 4], [-8, 0], [0, 4]])
def test_offsets_that_do_not_fit_the_shape_are_refused(folder: Path, offsets: list[int]) -> None:
    def move(header: Header) -> None:
        header["model.norm.weight"]["data_offsets"] = offsets

    edit_header(folder / "model.safetensors", move)
    with pytest.raises(CorruptCheckpoint) as caught:
        Checkpoint.open(folder)
    assert caught.value.tensor == "model.norm.weight"


def test_a_needed_tensor_in_an_unknown_format_is_refused(folder: Path) -> None:
    def quantize(header: Header) -> None:
        header["lm_head.weight"]["dtype"] = "F8_E4M3"

    edit_header(folder / "model.safetensors", quantize)
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight.*F8_E4M3"):
        Checkpoint.open(folder)


def test_an_expert_of_two_formats_is_refused(folder: Path) -> None:
    gate = "model.layers.1.mlp.experts.0.gate_proj.weight"

    def halve(header: Header) -> None:
        begin, end = header[gate]["data_offsets"]
        header[gate] |= {"dtype": "F16", "data_offsets": [begin, begin + (end - begin) // 2]}

    edit_header(folder / "model.safetensors", halve)
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight is float32, other matrices of this expert float16"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", shards=3)
    missing = folder / "model-00002-of-00003.safetensors"
    missing.unlink()
    with pytest.raises(CorruptCheckpoint, match=missing.name) as caught:
        Checkpoint.open(folder)
    assert caught.value.path == missing


def test_an_index_that_points_to_the_wrong_shard(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match=r"lm_head\.weight"):
        Checkpoint.open(folder)


def test_an_index_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", shards=2)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))
    with pytest.raises(CorruptCheckpoint, match="not a file of the same folder"):
        Checkpoint.open(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        Checkpoint.open(folder)
