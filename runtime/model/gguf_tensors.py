"""Where the tensors of a GGUF file are, under the names that transformers gives them; stacked experts one by one.

Matrices that are not experts and have a format that the kernels do not compute on (llama.cpp's Q4_0 files have an
output matrix in Q6_K) are converted to Q8_0 into the folder that stands for the file. Experts keep theirs: those that
the kernels do not know, the checkpoint refuses and `hotset pack` converts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from hotset.runtime.model.conversion import can_decode_ggml, convert_rows
from hotset.runtime.model.errors import UnsupportedModel
from hotset.runtime.model.gguf_config import Architecture
from hotset.runtime.model.gguf_file import GgufTensor
from hotset.runtime.model.tensor_index import EXPERT_DTYPES, MATRIX_DTYPES, StoredTensor

_DTYPES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "MXFP4": "mxfp4_ggml"}
_EXPERT_MATRICES: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_CONVERTED_VALUES: Final = 1 << 24  # at once: 64 MiB as float32
_LAYER_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",  # of gpt-oss
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


def stored_tensors(
    architecture: Architecture, tensors: Mapping[str, GgufTensor], folder: Path
) -> Iterator[tuple[str, StoredTensor]]:
    """What tensors.json of `folder` is to say. Raises UnsupportedModel."""
    matrices: dict[str, str] = dict(zip(_EXPERT_MATRICES, architecture.matrices, strict=True))
    for name, tensor in tensors.items():
        part, _, kind = name.rpartition(".")
        layer, _, part_in_layer = part.removeprefix("blk.").partition(".")
        if part in _MODEL_PARTS:
            yield f"{_MODEL_PARTS[part]}.{kind}", _dense(tensor, folder)
        elif part_in_layer == "attn_sinks":
            yield f"model.layers.{layer}.self_attn.sinks", _dense(tensor, folder)
        elif part_in_layer == "ffn_gate_inp":
            yield f"model.layers.{layer}.{architecture.router}.{kind}", _dense(tensor, folder)
        elif part_in_layer in _LAYER_PARTS:
            yield f"model.layers.{layer}.{_LAYER_PARTS[part_in_layer]}.{kind}", _dense(tensor, folder)
        elif part_in_layer in matrices:
            nbytes, dtype = tensor.nbytes // tensor.shape[0], _dtype(tensor)
            for expert in range(tensor.shape[0]):
                yield (
                    f"model.layers.{layer}.{architecture.experts}.{expert}.{matrices[part_in_layer]}.{kind}",
                    StoredTensor(str(tensor.file), tensor.offset + expert * nbytes, nbytes, dtype, tensor.shape[1:]),
                )
        else:
            raise UnsupportedModel(
                tensor.file, name, f"{tensor.file}: hotset does not know what the tensor {name} is for."
            )


def _dtype(tensor: GgufTensor) -> str:
    """As tensors.json has it: of what the kernels do not know, GGML's name."""
    dtype = _DTYPES.get(tensor.kind, tensor.kind.lower())
    if dtype not in EXPERT_DTYPES and not can_decode_ggml(dtype):
        raise UnsupportedModel(
            tensor.file,
            tensor.kind,
            f"{tensor.file}: {tensor.name} is stored as {tensor.kind}, which gguf cannot read.",
        )
    return dtype


def _dense(tensor: GgufTensor, folder: Path) -> StoredTensor:
    shape, dtype = tensor.shape, _dtype(tensor)
    if tensor.name.endswith("ffn_gate_inp_shexp.weight"):
        shape = (1, *shape)  # a matrix of one row, which llama.cpp keeps as a vector
    if dtype in MATRIX_DTYPES:
        return StoredTensor(str(tensor.file), tensor.offset, tensor.nbytes, dtype, shape)
    path = folder / f"{tensor.name}.q8_0"
    rows = max(1, _CONVERTED_VALUES // shape[-1])
    with path.open("wb") as file:
        for start in range(0, shape[0], rows):
            convert_rows(tensor.data[start : start + rows], dtype, "q8_0").tofile(file)
    return StoredTensor(path.name, 0, path.stat().st_size, "q8_0", shape)
