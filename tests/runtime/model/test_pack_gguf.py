"""Packing GGUF files: experts in formats that nothing computes on are decoded by the gguf library and converted."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from family_models import prompts
from gguf_factory import write_gguf
from in_process_model import InProcessModel
from model_factory import MXFP4, make_model
from numpy.typing import NDArray

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.expert_formats import CannotPack
from hotset.runtime.model.gguf_file import GgufFile, gguf_parts
from hotset.runtime.model.gguf_folder import gguf_folder
from hotset.runtime.model.pack import Packer

MATRICES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
ENCODED = {"q8_0": "Q8_0", "q4_0": "Q4_0", "bf16": "BF16"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(tmp_path: Path, quantization: str, tensors_per_part: int = 0, **others: str) -> Path:
    options = {"hidden_size": 256, "intermediate_size": 256, "num_kv_heads": 2, "head_dim": 16, "num_experts": 4}
    model = make_model(tmp_path / "model", family="qwen3_moe", dtype="float32", tokenizer=True, **options)
    path = tmp_path / "model.gguf"
    return write_gguf(model, path, "Q8_0", tensors_per_part, **dict.fromkeys(expert_tensors(), quantization) | others)


def expert_tensors() -> list[str]:
    return [f"blk.{layer}.{matrix}.weight" for layer in range(2) for matrix in MATRICES]


def packed(path: Path, out: Path, format: str | None) -> Path:
    Packer(gguf_folder(path), out, format).run(lambda finished: None)
    return out


def decoded_and_encoded(path: Path, layer: int, expert: int, format: str) -> NDArray[np.uint8]:
    """What the gguf library makes of an expert."""
    kind = gguf.GGMLQuantizationType[ENCODED[format]]
    tensors = GgufFile.read(gguf_parts(path)).tensors
    parts = []
    for matrix in MATRICES:
        tensor = tensors[f"blk.{layer}.{matrix}.weight"]
        values = gguf.quants.dequantize(tensor.data[expert], gguf.GGMLQuantizationType[tensor.kind])
        assert np.isfinite(values).all() and values.std() > 1e-4
        parts.append(gguf.quants.quantize(values, kind).reshape(-1).view(np.uint8))
    return np.concatenate(parts)


def expert_bytes(folder: Path, layer: int, expert: int) -> NDArray[np.uint8]:
    parts = Checkpoint.open(folder).expert(layer, expert).parts
    return np.concatenate([np.fromfile(part.file, np.uint8, part.nbytes, offset=part.offset) for part in parts])


@pytest.mark.parametrize(
    ("quantization", "format"),
    [
        *((quantization, "q8_0") for quantization in ("Q2_K", "Q3_K", "Q5_K", "Q6_K", "Q4_1", "Q5_0", "IQ4_NL")),
        *(("Q4_K", format) for format in ENCODED),
        ("Q8_0", "q4_0"),
        ("F16", "q4_0"),
    ],
)
def test_every_expert_is_what_the_library_decodes(quantization: str, format: str, tmp_path: Path) -> None:
    path = write(tmp_path, quantization)
    out = packed(path, tmp_path / "packed", format)
    for layer, expert in ((0, 0), (1, 3)):
        expected = decoded_and_encoded(path, layer, expert, format)
        np.testing.assert_array_equal(expert_bytes(out, layer, expert), expected)
    assert np.isfinite(InProcessModel(out).logits(prompts()[0])).all()


def gpt_oss(tmp_path: Path) -> Path:
    """Experts in MXFP4, other matrices in Q8_0."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_experts": 4}
    options = {"family": "gpt_oss", "quantization_config": MXFP4, "dtype": "bfloat16", "tokenizer": True}
    return write_gguf(make_model(tmp_path / "model", **options, **sizes), tmp_path / "model.gguf", "Q8_0")


def test_experts_of_gpt_oss_are_packed_as_they_are(tmp_path: Path) -> None:
    path = gpt_oss(tmp_path)
    out = packed(path, tmp_path / "packed", None)
    assert Checkpoint.open(out).expert_dtype(1, 3) == "mxfp4_ggml"
    expected = InProcessModel(gguf_folder(path)).logits(prompts()[0])
    np.testing.assert_array_equal(InProcessModel(out).logits(prompts()[0]), expected)


@pytest.mark.parametrize("quantization", ["MXFP4", "Q5_0"])
def test_biases_of_converted_experts_stay_as_they_are(quantization: str, tmp_path: Path) -> None:
    path = gpt_oss(tmp_path)
    if quantization != "MXFP4":  # from float32: gguf-py writes nothing from MXFP4
        options = {"family": "gpt_oss", "dtype": "float32", "tokenizer": True, "hidden_size": 64, "head_dim": 16}
        model = make_model(tmp_path / "wide", intermediate_size=32, num_experts=4, **options)
        path = write_gguf(model, tmp_path / "wide.gguf", quantization)
    out = packed(path, tmp_path / "packed", "q4_0")
    tensors = GgufFile.read([path]).tensors
    expected: list[NDArray[np.uint8]] = []
    for matrix in MATRICES:
        tensor, bias = tensors[f"blk.1.{matrix}.weight"], tensors[f"blk.1.{matrix}.bias"]
        assert (tensor.kind, bias.kind) == (quantization, "F32")
        values = gguf.quants.dequantize(tensor.data[2], gguf.GGMLQuantizationType[quantization])
        rows = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
        expected += [rows.reshape(-1), np.ascontiguousarray(bias.data[2]).view(np.uint8)]
    np.testing.assert_array_equal(expert_bytes(out, 1, 2), np.concatenate(expected))
    assert np.isfinite(InProcessModel(out).logits(prompts()[0])).all()


def test_an_expert_of_several_formats_becomes_one_of_one(tmp_path: Path) -> None:
    """As llama.cpp's Q4_K_M has it: down projections of some layers are finer than the rest."""
    path = write(tmp_path, "Q4_K", **{"blk.1.ffn_down_exps.weight": "Q6_K"})
    out = packed(path, tmp_path / "packed", "q8_0")
    for layer in range(2):
        np.testing.assert_array_equal(expert_bytes(out, layer, 2), decoded_and_encoded(path, layer, 2, "q8_0"))


def test_a_file_in_parts_is_packed_whole(tmp_path: Path) -> None:
    path = write(tmp_path, "Q5_K", tensors_per_part=10)
    out = packed(path, tmp_path / "packed", "q4_0")
    np.testing.assert_array_equal(expert_bytes(out, 1, 3), decoded_and_encoded(path, 1, 3, "q4_0"))


def test_one_expert_is_in_memory_at_a_time(tmp_path: Path) -> None:
    packer = Packer(gguf_folder(write(tmp_path, "Q4_K")), tmp_path / "packed", "q8_0")
    values = 2 * 4 * 3 * 256 * 256
    tracemalloc.start()
    packer.run(lambda finished: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * values, "as much as all experts in float32"


def test_a_format_has_to_be_given_for_what_cannot_stay(tmp_path: Path) -> None:
    folder = gguf_folder(write(tmp_path, "Q4_K", **{"blk.1.ffn_down_exps.weight": "Q6_K"}))
    with pytest.raises(CannotPack, match="stored as q4_k, q6_k; give one of bf16, q8_0, q4_0, mixed"):
        Packer(folder, tmp_path / "packed")


def test_what_a_format_cannot_hold_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "F32")
    tensor = GgufFile.read([path]).tensors["blk.1.ffn_up_exps.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset + 2 * tensor.nbytes // 4 + 40)  # in the third of four experts
        file.write(np.array(np.inf, "<f4").tobytes())
    with pytest.raises(CannotPack, match=r"expert 2 of layer 1: the value inf at position \(0, 10\) cannot be stored"):
        packed(path, tmp_path / "packed", "q8_0")


def test_four_bits_do_not_become_eight(tmp_path: Path) -> None:
    with pytest.raises(CannotPack, match="are q4_0 already; q8_0 would only be larger"):
        Packer(gguf_folder(write(tmp_path, "Q4_0")), tmp_path / "packed", "q8_0")
