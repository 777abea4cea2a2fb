"""The sizes and options of a model, from Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, Self

import msgspec

from hotset.runtime.kv.layer_groups import LayerGroups
from hotset.runtime.model.config_file import ConfigFile
from hotset.runtime.model.errors import ModelNotFound, UnsupportedModel
from hotset.runtime.model.families import FAMILIES, Family
from hotset.runtime.model.rope import Rope
from hotset.shm.kv_page_format import KvFormat, KvPageLayout

DTYPES: Final = ("float32", "float16", "bfloat16")
MXFP4_BLOCK: Final = 32  # values that share a scale
MAX_HEAD_DIM: Final = 512  # of the attention kernel

ExpertLayout = Literal["gate_up_down", "interleaved_with_biases", "gate_up_down_with_biases"]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A supported model: whatever cannot be computed exactly as the model was trained is refused by `load`.

    Attributes:
        intermediate_size: inner size of one expert.
        dense_layers: layers with an ordinary feed-forward block of `dense_intermediate_size` in the place of experts.
        shared_intermediate_size: inner size of the expert that every row goes through; 0 if there is none.
        biased: the projections of the attention that have a bias.
        expert_layout: what lies one after another in an expert's slot (expert_parts.py).
        windows: per layer, how many positions a row sees, its own included; 0: all from the first on.
        mxfp4_experts: they are packed in 4-bit numbers; all else is as `dtype` says.
        swiglu_limit: what gate and up are clamped to before they are multiplied as gpt-oss does it; 0: silu(gate) * up.
        normalize_top_k: the mixing weights of the chosen experts are divided by their sum.
        rope_interleaved: the pairs that rotate together are neighbours in a head, not half a head apart.
        clip_qkv: queries, keys and values are clipped to plus or minus this value.
        dtype: what config.json declares; each tensor has its own.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    dense_layers: frozenset[int]
    dense_intermediate_size: int
    shared_intermediate_size: int
    biased: tuple[str, ...]
    expert_layout: ExpertLayout
    windows: tuple[int, ...]
    mxfp4_experts: bool
    swiglu_limit: float
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    normalize_top_k: bool
    rope: Rope
    rope_interleaved: bool
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    clip_qkv: float | None
    dtype: str

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder`/config.json, and generation_config.json for further end-of-text ids.

        Raises ModelNotFound, UnsupportedModel (naming the architecture or option) or CorruptCheckpoint.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if folder.is_file():
            raise ModelNotFound(folder, f"{folder} is a file, expected a model folder or a file that ends in .gguf.")
        if not folder.is_dir():
            raise ModelNotFound(folder, f"There is no model folder at {folder}.")
        if not path.is_file():
            raise ModelNotFound(folder, f"{folder} is not a model folder: it has no config.json.")
        file = ConfigFile.read(path)
        family = _family(file)
        _refuse_unsupported(file, family)
        rope = Rope.of(file, family.rope_theta)

        num_layers = file.count("num_hidden_layers")
        num_heads, num_kv_heads, head_dim = _heads(file)
        num_experts = file.count("num_experts", default=_count_or_none(file, "num_local_experts"))
        experts_per_token = file.count("num_experts_per_tok")
        if experts_per_token > num_experts:
            raise file.corrupt(f"num_experts_per_tok is {experts_per_token} but num_experts is {num_experts}")
        dense_layers = _dense_layers(file, num_layers)
        return cls(
            family=family,
            vocab_size=file.count("vocab_size"),
            hidden_size=file.count("hidden_size"),
            intermediate_size=file.count(family.expert_size_option),
            dense_layers=dense_layers,
            dense_intermediate_size=file.count("intermediate_size") if dense_layers else 0,
            shared_intermediate_size=file.count("shared_expert_intermediate_size") if family.shared_expert else 0,
            biased=family.biased if _has_bias(file, family) else (),
            expert_layout=_expert_layout(file, family),
            windows=_windows(file, family, num_layers),
            mxfp4_experts=_has_mxfp4_experts(file, family),
            swiglu_limit=file.number("swiglu_limit", default=family.swiglu_limit) if family.swiglu_limit else 0.0,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            normalize_top_k=file.flag("norm_topk_prob"),
            rope=rope,
            rope_interleaved=file.flag("rope_interleave"),
            rms_norm_eps=file.number("rms_norm_eps", default=family.rms_norm_eps),
            max_position_embeddings=file.count("max_position_embeddings", default=4096),
            tie_word_embeddings=file.flag("tie_word_embeddings"),
            bos_token_id=next(iter(file.integers("bos_token_id")), None),
            eos_token_ids=tuple(sorted({*file.integers("eos_token_id"), *_end_of_text(folder, family)})),
            clip_qkv=file.optional_number("clip_qkv"),
            dtype=_dtype(file),
        )

    @property
    def widest_feed_forward(self) -> int:
        """The largest inner size of a block with dense weights; 0 if all feed-forward blocks are experts."""
        return max(self.dense_intermediate_size, self.shared_intermediate_size)

    @property
    def num_experts_in_all(self) -> int:
        """Of all layers that have experts."""
        return (self.num_layers - len(self.dense_layers)) * self.num_experts

    @property
    def kv_groups(self) -> LayerGroups:
        """The layers that share KV pages."""
        return LayerGroups.of(self.windows)

    def kv_page_layout(self, block_size: int, kv_format: KvFormat) -> KvPageLayout:
        """What a KV page looks like: `block_size` tokens in the layers of one group."""
        return KvPageLayout(
            num_layers=self.kv_groups.layers_per_group,
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            format=kv_format,
        )

    def kv_nbytes_per_token(self, kv_format: KvFormat) -> int:
        """In all layers."""
        return self.kv_groups.num_groups * self.kv_page_layout(1, kv_format).page_nbytes


def _family(file: ConfigFile) -> Family:
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


def _end_of_text(folder: Path, family: Family) -> Iterator[int]:
    """What ends an answer besides the id in config.json."""
    generation, tokenizer = folder / "generation_config.json", folder / "tokenizer_config.json"
    if generation.is_file():
        yield from ConfigFile.read(generation).integers("eos_token_id")
    if family.end_of_text and tokenizer.is_file():
        added = ConfigFile.read(tokenizer).section("added_tokens_decoder")
        yield from (int(id) for id in added if added.section(id).get("content") in family.end_of_text)


def _dtype(file: ConfigFile) -> str:
    return str(file.get("dtype", file.get("torch_dtype", "float32")))


def _has_bias(file: ConfigFile, family: Family) -> bool:
    return family.bias_option is not None and file.flag(family.bias_option, default=family.bias_default)


def _has_mxfp4_experts(file: ConfigFile, family: Family) -> bool:
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


def _expert_layout(file: ConfigFile, family: Family) -> ExpertLayout:
    if not family.interleaved_experts:
        return "gate_up_down"
    # Said only by folders that stand for GGUF files (gguf_config.py).
    interleaved = file.flag("interleaved_experts", default=True)
    return "interleaved_with_biases" if interleaved else "gate_up_down_with_biases"


def _refuse_unsupported(file: ConfigFile, family: Family) -> None:
    for option, value, supported in (
        ("dtype", _dtype(file), DTYPES),
        ("hidden_act", file.get("hidden_act", "silu"), ("silu",)),
        ("swiglu_alpha", file.get("swiglu_alpha", 1.702), (1.702,)),  # of the kernel
    ):
        file.refuse_unless(option, value, supported)
    for option in ("attention_bias", "qkv_bias", "mlp_bias"):
        if option != family.bias_option:
            file.refuse_unless(option, file.flag(option), (False,))


def _windows(file: ConfigFile, family: Family, num_layers: int) -> tuple[int, ...]:
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


def _heads(file: ConfigFile) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head."""
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


def _dense_layers(file: ConfigFile, num_layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer has experts, except for `mlp_only_layers`."""
    step = file.count("decoder_sparse_step", default=1)
    named = frozenset(file.integers("mlp_only_layers"))
    dense = frozenset(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)
    if len(dense) == num_layers:
        raise UnsupportedModel(
            file.path,
            "mlp_only_layers",
            f"{file.path}: mlp_only_layers and decoder_sparse_step leave no layer with experts.",
        )
    return dense


def _count_or_none(file: ConfigFile, key: str) -> int | None:
    return None if file.get(key) is None else file.count(key)
