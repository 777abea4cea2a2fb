"""GGUF files made from model folders, as llama.cpp's converter makes them: its names, its order of axes and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from hotset.runtime.model.checkpoint import Checkpoint
from hotset.workers.compute.weights import as_float32

ARCHITECTURES = {
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "mixtral": "llama",
    "gpt_oss": "gpt-oss",
}


# Blocks of the formats that gguf-py cannot write: bytes in all, and where their float16 scales are.
SCALES_OF_BLOCKS = {
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
    "IQ4_NL": (18, (0,)),
}


def write_gguf(folder: Path, path: Path, quantization: str, tensors_per_part: int = 0, **metadata: Any) -> Path:
    """The model in `folder` as `path`, matrices in `quantization` ("F32", "Q8_0", ...), vectors in float32. Experts in
    MXFP4 stay so.

    In a format that gguf-py cannot write, a matrix has random blocks instead.

    `tensors_per_part`: write several files; returns the first. `metadata`: further keys, or others in the place of the
    usual ones; or a quantization for a tensor of that name.
    """
    others = {name: metadata.pop(name) for name in [*metadata] if name.endswith(".weight")}
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    architecture = ARCHITECTURES[family]
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config["num_hidden_layers"]
    )
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_per_part)
    for key, value in (_metadata(architecture, config) | tokenizer_metadata(folder) | metadata).items():
        _add(writer, key, value)
    weights = _weights(folder)
    stacked = separated(weights) if family == "gpt_oss" else _stacked(weights, _num_experts(config))
    for name, values in stacked.items():
        if family == "mixtral" and "self_attn.q_proj" in name:
            values = _interleaved(values, config["num_attention_heads"])
        if family == "mixtral" and "self_attn.k_proj" in name:
            values = _interleaved(values, config["num_key_value_heads"])
        if name.endswith("shared_expert_gate.weight"):
            values = values[0]
        theirs = names.get_name(name, (".weight", ".bias"))
        if theirs is None:
            raise ValueError(f"llama.cpp has no name for {name}")
        _add_tensor(writer, theirs, values, others.get(theirs, quantization))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-*.gguf"))


def dequantized(folder: Path, quantization: str) -> dict[str, NDArray[np.float32]]:
    """The weights of the folder as they are after their way through `quantization`."""
    weights = _weights(folder)
    for name, values in weights.items():
        if values.ndim == 3 and not _stays_float32(name, values):  # gpt-oss' experts, a row for each input
            weights[name] = _turned(through(_turned(values), quantization))
        elif not _stays_float32(name, values):
            weights[name] = through(values, quantization)
    return weights


def _turned(matrices: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.ascontiguousarray(matrices.swapaxes(1, 2))


def separated(weights: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """gpt-oss' experts with matrices of their own for gate and up, a row for each output, MXFP4 in GGML's blocks."""
    found: dict[str, NDArray[Any]] = {}
    for name, values in weights.items():
        before, _, part = name.partition(".mlp.experts.")
        if name.endswith(".sinks"):
            found[f"{name}.weight"] = values
        elif not part:
            found[name] = values
        elif not part.endswith("_scales"):
            matrix, _, kind = part.partition("_proj")
            if kind == "":
                values = _turned(values)
            if kind == "_blocks":
                scales = weights[name.replace("_blocks", "_scales")]
                values = _ggml_blocks(values, scales)
            kind = "bias" if kind == "_bias" else "weight"
            parts = {"gate": values[:, 0::2], "up": values[:, 1::2]} if matrix == "gate_up" else {matrix: values}
            for each, rows in parts.items():
                found[f"{before}.mlp.experts.{each}_proj.{kind}"] = np.ascontiguousarray(rows)
    return found


def _ggml_blocks(numbers: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [experts, rows, blocks, 16], of which each holds two neighbours, and [experts, rows, blocks] -> [experts,
    rows, blocks * 17]: in a block the scale comes first, and the halves of a byte are 16 values apart.
    """
    codes = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*scales.shape, 32)
    blocks = np.concatenate([scales[..., None], codes[..., :16] | codes[..., 16:] << 4], axis=-1)
    return blocks.reshape(*scales.shape[:2], -1)


def through(values: NDArray[np.float32], quantization: str) -> NDArray[np.float32]:
    kind = gguf.GGMLQuantizationType[quantization]
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).astype(np.float32)


def _weights(folder: Path) -> dict[str, NDArray[Any]]:
    """float32, or bytes of packed numbers."""
    checkpoint = Checkpoint.open(folder)
    weights = {name: checkpoint.dense(name) for name in checkpoint.tensors}
    return {name: values if values.dtype == np.uint8 else as_float32(values) for name, values in weights.items()}


def _stays_float32(name: str, values: NDArray[np.float32]) -> bool:
    """Vectors, and what decides about experts: names of transformers or of llama.cpp."""
    routers = (".gate.weight", ".router.weight", "shared_expert_gate.weight", "ffn_gate_inp.weight")
    return values.ndim == 1 or name.endswith((*routers, "bias"))


def _stacked(weights: dict[str, NDArray[np.float32]], num_experts: int) -> dict[str, NDArray[np.float32]]:
    """`...experts.E.part` of all experts become one `...experts.part`."""
    stacked: dict[str, NDArray[np.float32]] = {}
    for name, values in weights.items():
        if ".experts.0." in name:
            parts = [weights[name.replace(".experts.0.", f".experts.{expert}.")] for expert in range(num_experts)]
            stacked[name.replace(".experts.0.", ".experts.")] = np.stack(parts)
        elif ".experts." not in name:
            stacked[name] = values
    return stacked


def _interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """As llama.cpp's converter reorders Llama's rows: the two halves of a head alternate."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization]
    if values.dtype == np.uint8:
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
    elif _stays_float32(name, values) or quantization == "F32":
        writer.add_tensor(name, values)
    elif quantization == "F16":
        writer.add_tensor(name, values.astype(np.float16))
    elif quantization in SCALES_OF_BLOCKS:
        writer.add_tensor(name, random_blocks(values.shape, quantization), raw_dtype=kind)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def random_blocks(shape: tuple[int, ...], quantization: str) -> NDArray[np.uint8]:
    """Bytes [..., rows, bytes of a row] of random numbers with small finite scales."""
    nbytes, scales = SCALES_OF_BLOCKS[quantization]
    values_per_block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization]]
    random = np.random.default_rng(shape[-1])
    blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // values_per_block, nbytes), np.uint8)
    for at in scales:
        scale = random.uniform(1e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scale[..., np.newaxis].view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def _num_experts(config: dict[str, Any]) -> int:
    return config["num_experts"] if "num_experts" in config else config["num_local_experts"]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def _metadata(architecture: str, config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    rope, window = config.get("rope_scaling") or {}, config["sliding_window"] if architecture == "gpt-oss" else None
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": inner,
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "attention.sliding_window": window,
        "rope.freq_base": float(config["rope_theta"]),
        "rope.scaling.type": rope.get("rope_type"),
        "rope.scaling.factor": rope.get("factor"),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "expert_count": _num_experts(config),
        "expert_used_count": config["num_experts_per_tok"],
    }
    return {f"{architecture}.{key}": value for key, value in values.items()}


def tokenizer_metadata(folder: Path) -> dict[str, Any]:
    """Of a byte-level tokenizer.json; no merges are no key, as GGUF has no empty lists."""
    model = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(model["model"]["vocab"], key=model["model"]["vocab"].__getitem__)
    special = {token["content"] for token in model["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in vocabulary],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["model"]["merges"]] or None,
        "tokenizer.ggml.eos_token_id": 0,
    }
