"""What single options of config.json mean for a family, and which are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from hotset.runtime.model.config_file import ConfigFile
from hotset.runtime.model.errors import UnsupportedModel
from hotset.runtime.model.families import FAMILIES, Family
from hotset.runtime.model.latent_attention import LatentAttention
from hotset.runtime.router_config import MAX_EXPERTS, MAX_TOP_K

DTYPES: Final = ("float32", "float16", "bfloat16")
MXFP4_BLOCK: Final = 32  # values that share a scale
MAX_HEAD_DIM: Final = 1024  # of the attention kernel
MAX_EXPERT_GROUPS: Final = 64  # of the router

ExpertLayout = Literal["gate_up_down", "interleaved_with_biases", "gate_up_down_with_biases"]


def family_of(file: ConfigFile) -> Family:
    architectures = file.strings("architectures")
    architecture = architectures[0] if architectures else str(file.get("model_type", "unknown"))
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModel(
            file.path,
            architecture,
            f"{file.path}: hotset cannot run the architecture {architecture}; it knows {', '.join(FAMILIES)}.",
        )
    return family


def end_of_text(folder: Path, family: Family) -> Iterator[int]:
    """What ends an answer besides the id in config.json."""
    generation, tokenizer = folder / "generation_config.json", folder / "tokenizer_config.json"
    if generation.is_file():
        yield from ConfigFile.read(generation).integers("eos_token_id")
    if family.end_of_text and tokenizer.is_file():
        added = ConfigFile.read(tokenizer).section("added_tokens_decoder")
        yield from (int(id) for id in added if added.section(id).get("content") in family.end_of_text)


def dtype_of(file: ConfigFile) -> str:
    return str(file.get("dtype", file.get("torch_dtype", "float32")))


def has_bias(file: ConfigFile, family: Family) -> bool:
    return family.bias_option is not None and file.flag(family.bias_option, default=family.bias_default)


def has_mxfp4_experts(file: ConfigFile, family: Family) -> bool:
    method = file.section("quantization_config").get("quant_method")
    if method is None:
        file.refuse_unless("quantization_config", file.get("quantization_config"), (None,))
    file.refuse_unless("quantization_config", method, (None, "mxfp4") if family.mxfp4_experts else (None,))
    if method is None:
        return False
    for option in ("hidden_size", family.expert_size_option):
        if file.count(option) % MXFP4_BLOCK:
            raise file.corrupt(f"{option} is {file.count(option)}, expected a multiple of {MXFP4_BLOCK} for mxfp4")
    return True


def expert_layout(file: ConfigFile, family: Family) -> ExpertLayout:
    if not family.interleaved_experts:
        return "gate_up_down"
    # Said only by folders that stand for GGUF files (gguf_config.py).
    interleaved = file.flag("interleaved_experts", default=True)
    return "interleaved_with_biases" if interleaved else "gate_up_down_with_biases"


def refuse_unsupported(file: ConfigFile, family: Family) -> None:
    for option, value, supported in (
        ("dtype", dtype_of(file), DTYPES),
        ("hidden_act", file.get("hidden_act", "silu"), ("silu",)),
        ("swiglu_alpha", file.get("swiglu_alpha", 1.702), (1.702,)),  # of the kernel
    ):
        file.refuse_unless(option, value, supported)
    for option in ("attention_bias", "qkv_bias", "mlp_bias"):
        if option != family.bias_option:
            file.refuse_unless(option, file.flag(option), (False,))
    for option, supported in family.only.items():
        file.refuse_unless(option, file.get(option, supported[0]), supported)


def windows(file: ConfigFile, family: Family, num_layers: int) -> tuple[int, ...]:
    everything = (0,) * num_layers
    if file.get("sliding_window") is None or (family.window_switch and not file.flag("use_sliding_window")):
        return everything
    if family.windows == "none":
        file.refuse_unless("sliding_window", file.get("sliding_window"), (None,))
    window = file.count("sliding_window")
    if family.windows == "all":
        return (window,) * num_layers
    kinds = file.strings("layer_types")
    if family.windows == "alternating" and not kinds:
        return tuple(0 if layer % 2 else window for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise file.corrupt(f"layer_types names {len(kinds)} of {num_layers} layers, sliding_window needs all")
    for kind in kinds:
        file.refuse_unless("layer_types", kind, ("full_attention", "sliding_attention"))
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def heads(file: ConfigFile, latent: LatentAttention | None) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head, as its keys are stored."""
    if latent is not None:
        return _latent_heads(file, latent)
    hidden_size, num_heads = file.count("hidden_size"), file.count("num_attention_heads")
    num_kv_heads = file.count("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise file.corrupt(f"{num_heads} heads cannot share {num_kv_heads} key-value heads evenly")
    if file.get("head_dim") is None and hidden_size % num_heads:
        raise file.corrupt(f"{num_heads} heads do not divide hidden_size {hidden_size}, and head_dim is not given")
    head_dim = file.count("head_dim", default=hidden_size // num_heads)
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise file.corrupt(f"the head size is {head_dim}, expected an even number up to {MAX_HEAD_DIM}")
    return num_heads, num_kv_heads, head_dim


def _latent_heads(file: ConfigFile, latent: LatentAttention) -> tuple[int, int, int]:
    num_heads = file.count("num_attention_heads")
    file.refuse_unless("num_key_value_heads", file.get("num_key_value_heads", num_heads), (num_heads,))
    if latent.row_dim > MAX_HEAD_DIM:
        raise file.corrupt(
            f"kv_lora_rank and qk_rope_head_dim are {latent.row_dim} together, expected up to {MAX_HEAD_DIM}"
        )
    return num_heads, 1, latent.row_dim


def dense_layers(file: ConfigFile, num_layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers` and the `first_k_dense_replace`."""
    step, first = file.count("decoder_sparse_step", default=1), file.count_or_zero("first_k_dense_replace")
    named = frozenset(file.integers("mlp_only_layers"))
    dense = frozenset(layer for layer in range(num_layers) if layer < first or layer in named or (layer + 1) % step)
    if len(dense) == num_layers:
        option = "first_k_dense_replace" if first else "mlp_only_layers"
        raise UnsupportedModel(
            file.path,
            option,
            f"{file.path}: {option} and decoder_sparse_step leave no layer with experts.",
        )
    return dense


def shared_intermediate_size(file: ConfigFile, family: Family) -> int:
    match family.shared_expert:
        case "none":
            return 0
        case "gated":
            return file.count("shared_expert_intermediate_size")
        case "added":
            return file.count("n_shared_experts") * file.count(family.expert_size_option)


def weight_scale(file: ConfigFile, family: Family) -> float:
    default = family.routed_scaling_factor
    return file.number("routed_scaling_factor", default=default) if default else 1.0


def expert_counts(file: ConfigFile, family: Family) -> tuple[int, int]:
    """How many experts a layer has, and how many a token uses."""
    num_experts = file.count(family.expert_count_option, default=count_or_none(file, "num_local_experts"))
    per_token = file.count("num_experts_per_tok")
    if per_token > num_experts:
        raise file.corrupt(f"num_experts_per_tok is {per_token} but {family.expert_count_option} is {num_experts}")
    for option, count, most in (
        (family.expert_count_option, num_experts, MAX_EXPERTS),
        ("num_experts_per_tok", per_token, MAX_TOP_K),
    ):
        if count > most:
            raise UnsupportedModel(file.path, option, f"{file.path}: {option} is {count}; hotset routes up to {most}.")
    return num_experts, per_token


def expert_groups(file: ConfigFile, family: Family, num_experts: int, experts_per_token: int) -> tuple[int, int]:
    """How many there are, and of how many a token uses experts."""
    method = file.get("topk_method", next(iter(family.only.get("topk_method", (None,)))))
    if family.grouped_by is None or method != family.grouped_by:
        return 1, 1
    groups, top_groups = file.count("n_group"), file.count("topk_group")
    if groups > MAX_EXPERT_GROUPS or num_experts % groups:
        raise file.corrupt(
            f"n_group is {groups}, expected up to {MAX_EXPERT_GROUPS} that divide {num_experts} experts evenly"
        )
    if not experts_per_token * groups <= top_groups * num_experts <= groups * num_experts:
        raise file.corrupt(
            f"topk_group is {top_groups}, expected up to {groups} groups with at least {experts_per_token} experts"
        )
    return groups, top_groups


def count_or_none(file: ConfigFile, key: str) -> int | None:
    return None if file.get(key) is None else file.count(key)
