"""A GGUF file as a model folder: what every process needs to know of it, read once and kept in a cache.

llama.cpp's metadata become config.json, its vocabulary tokenizer.json, and tensors.json says where in the GGUF file
each weight lies, under the names that transformers gives it; the weights themselves stay where they are. So only this
module and gguf_tokenizer.py know the format, and only the first process that opens a file reads its metadata (which
takes seconds for large vocabularies).

Matrices that are not experts and have a format that the kernels do not compute on (llama.cpp's Q4_0 files have an
output matrix in Q6_K) are converted to Q8_0 into the folder. Such experts are refused: `hotset pack` converts them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import xxhash

from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from hotset.runtime.model.model_cache import cache_root
from hotset.runtime.model.tensor_index import TENSORS_JSON, StoredTensor

_VERSION: Final = 2  # of what this module writes
_STORED: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0", "Q4_0": "q4_0"}
_EXPERT_MATRICES: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


class _Architecture(msgspec.Struct, frozen=True):
    """How transformers names what llama.cpp calls by `general.architecture`, and what that implies."""

    architecture: str
    experts: str = "mlp.experts"
    router: str = "mlp.gate"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    expert_size_option: str = "moe_intermediate_size"
    options: Mapping[str, Any] = {}


_ARCHITECTURES: Final = {
    "olmoe": _Architecture("OlmoeForCausalLM", expert_size_option="intermediate_size"),
    "qwen2moe": _Architecture("Qwen2MoeForCausalLM"),
    "qwen3moe": _Architecture("Qwen3MoeForCausalLM", options={"norm_topk_prob": True}),
    "llama": _Architecture(
        "MixtralForCausalLM",
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.gate",
        matrices=("w1", "w3", "w2"),
        expert_size_option="intermediate_size",
        options={"rope_interleave": True},  # llama.cpp reorders the rows of Llama's queries and keys
    ),
}

# config.json's key: llama.cpp's, behind the architecture's name.
_OPTIONS: Final = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "clip_qkv": "attention.clamp_kqv",
    "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
_ROPE_OPTIONS: Final = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
}
_LAYER_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_PARTS: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def model_folder(model: Path) -> Path:
    """Absolute path of the folder with a model: itself, or what stands for a GGUF file."""
    return gguf_folder(model) if model.suffix == ".gguf" else model.absolute()


def gguf_folder(path: Path) -> Path:
    """The model folder that stands for a GGUF file; made on first use, in the user's cache.

    Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint.
    """
    if not path.is_file():
        raise ModelNotFound(path, f"There is no GGUF file at {path}.")
    state = path.stat()
    identity = f"{_VERSION} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = cache_root() / "gguf" / f"{path.stem}-{xxhash.xxh3_64_hexdigest(identity.encode())}"
    if not (folder / TENSORS_JSON).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _write_folder(path.resolve(), made)
            made.rename(folder)
        except OSError:
            if not (folder / TENSORS_JSON).is_file():  # otherwise another process was quicker
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _write_folder(path: Path, folder: Path) -> None:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedModel(path, "gguf", f"{path} is a GGUF file: install hotset[gguf] to read it.") from error
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise CorruptCheckpoint(path, f"{path} cannot be read as a GGUF file: {error}.") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata.get("split.count", 1) > 1:
        raise UnsupportedModel(path, "split.count", f"{path} is one of several parts: join them by llama-gguf-split.")
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES or not metadata.get(f"{name}.expert_count"):
        known = ", ".join(_ARCHITECTURES)
        raise UnsupportedModel(
            path,
            str(name),
            f"{path}: hotset cannot run the architecture {name}; of GGUF's it knows {known}, with experts.",
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    stored = dict(_stored_tensors(path, folder, _ARCHITECTURES[name], tensors))
    config = _config(name, metadata, tensors)
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    from hotset.runtime.model.gguf_tokenizer import build_tokenizer

    try:
        tokenizer = build_tokenizer(path, metadata)
    except UnsupportedModel:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CorruptCheckpoint(path, f"{path} has a tokenizer that does not fit together: {error}.") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(_special_tokens(metadata)))
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template)
    (folder / TENSORS_JSON).write_bytes(msgspec.json.encode(stored))


def _config(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' config.json would say."""
    architecture = _ARCHITECTURES[name]

    def given(options: Mapping[str, str]) -> dict[str, Any]:
        return {key: metadata[f"{name}.{ours}"] for key, ours in options.items() if f"{name}.{ours}" in metadata}

    def rows(tensor: str, axis: int = -1) -> int:
        return int(tensors[tensor].shape[axis])

    experts = next(tensor for tensor in tensors if tensor.endswith("ffn_gate_exps.weight"))
    config = given(_OPTIONS) | {
        "architectures": [architecture.architecture],
        "vocab_size": rows("token_embd.weight"),
        "tie_word_embeddings": "output.weight" not in tensors,
        architecture.expert_size_option: rows(experts, 1),
        "eos_token_id": _end_of_text_ids(metadata),
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "mlp_only_layers": [
            layer
            for layer in range(metadata[f"{name}.block_count"])
            if f"blk.{layer}.ffn_gate_exps.weight" not in tensors
        ],
        **architecture.options,
    }
    for option, tensor in (
        ("shared_expert_intermediate_size", "ffn_gate_shexp.weight"),
        ("intermediate_size", "ffn_gate.weight"),
    ):
        found = next((name for name in tensors if name.endswith(f".{tensor}")), None)
        if found:
            config[option] = rows(found)
    rope = given(_ROPE_OPTIONS)
    if rope.get("rope_type", "none") != "none":
        config["rope_scaling"] = rope
    return config


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """By the names that chat templates use."""
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    return {name: metadata["tokenizer.ggml.tokens"][id] for name, id in ids.items() if id is not None}


def _end_of_text_ids(metadata: Mapping[str, Any]) -> list[int]:
    """End of text, of a turn and of a message: any of them ends an answer."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = {metadata.get(f"tokenizer.ggml.{key}") for key in keys}
    return sorted(int(number) for number in found if number is not None)


def _stored_tensors(
    path: Path, folder: Path, architecture: _Architecture, tensors: Mapping[str, Any]
) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor under transformers' name; stacked experts one by one."""
    matrices: dict[str, str] = dict(zip(_EXPERT_MATRICES, architecture.matrices, strict=True))
    for name, tensor in tensors.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF names the innermost dimension first
        part, _, kind = name.rpartition(".")
        layer, _, part_in_layer = part.removeprefix("blk.").partition(".")
        if part in _MODEL_PARTS:
            yield f"{_MODEL_PARTS[part]}.{kind}", _dense(path, folder, tensor, shape)
        elif part_in_layer == "ffn_gate_inp":
            yield f"model.layers.{layer}.{architecture.router}.{kind}", _dense(path, folder, tensor, shape)
        elif part_in_layer in _LAYER_PARTS:
            if part_in_layer == "ffn_gate_inp_shexp":
                shape = (1, *shape)  # a matrix of one row, which llama.cpp keeps as a vector
            yield f"model.layers.{layer}.{_LAYER_PARTS[part_in_layer]}.{kind}", _dense(path, folder, tensor, shape)
        elif part_in_layer in matrices:
            dtype = _STORED.get(tensor.tensor_type.name)
            if dtype is None:
                raise UnsupportedModel(
                    path,
                    name,
                    f"{path}: the experts {name} are stored as {tensor.tensor_type.name}; hotset computes on "
                    f"{', '.join(_STORED)}. `hotset pack` converts the others.",
                )
            nbytes = int(tensor.n_bytes) // shape[0]
            for expert in range(shape[0]):
                offset = int(tensor.data_offset) + expert * nbytes
                yield (
                    f"model.layers.{layer}.{architecture.experts}.{expert}.{matrices[part_in_layer]}.{kind}",
                    StoredTensor(str(path), offset, nbytes, dtype, shape[1:]),
                )


def _dense(path: Path, folder: Path, tensor: Any, shape: tuple[int, ...]) -> StoredTensor:
    dtype = _STORED.get(tensor.tensor_type.name)
    if dtype is not None:
        return StoredTensor(str(path), int(tensor.data_offset), int(tensor.n_bytes), dtype, shape)
    import gguf

    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    data = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), gguf.GGMLQuantizationType.Q8_0)
    file = f"{tensor.name}.q8_0"
    data.tofile(folder / file)
    return StoredTensor(file, 0, data.nbytes, "q8_0", shape)
