"""The sizes and options of a model, from Hugging Face's config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import msgspec

from hotset.runtime.argument_types import integer
from hotset.runtime.kv.layer_groups import LayerGroups
from hotset.runtime.model import config_options as options
from hotset.runtime.model.config_file import ConfigFile
from hotset.runtime.model.config_options import ExpertLayout
from hotset.runtime.model.errors import ModelNotFound
from hotset.runtime.model.families import Family
from hotset.runtime.model.latent_attention import LatentAttention
from hotset.runtime.model.pack_manifest import is_unfinished_pack
from hotset.runtime.model.rope import Rope
from hotset.shm.kv_page_format import KvFormat, KvPageLayout


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A supported model: whatever cannot be computed exactly as the model was trained is refused by `load`.

    Attributes:
        intermediate_size: inner size of one expert.
        dense_layers: layers with an ordinary feed-forward block of `dense_intermediate_size` in the place of experts.
        shared_intermediate_size: inner size of the expert that every row goes through; 0 if there is none.
        latent: sizes of latent attention; None for the ordinary one. Then there is a single key-value head.
        biased: the projections of the attention that have a bias.
        expert_layout: what lies one after another in an expert's slot (expert_parts.py).
        windows: per layer, how many positions a row sees, its own included; 0: all from the first on.
        mxfp4_experts: they are packed in 4-bit numbers; all else is as `dtype` says.
        swiglu_limit: what gate and up are clamped to before they are multiplied as gpt-oss does it; 0: silu(gate) * up.
        head_dim: of keys and, before they are stored, of queries.
        attention_scale: factor on the products of the two.
        expert_groups, top_expert_groups: experts of the best `top_expert_groups` of so many groups are chosen.
        normalize_top_k: the mixing weights of the chosen experts are divided by their sum.
        weight_scale: factor on the mixing weights.
        rope_interleaved: the pairs that rotate together are neighbours in a head, not half of what rotates apart.
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
    latent: LatentAttention | None
    biased: tuple[str, ...]
    expert_layout: ExpertLayout
    windows: tuple[int, ...]
    mxfp4_experts: bool
    swiglu_limit: float
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attention_scale: float
    num_experts: int
    experts_per_token: int
    expert_groups: int
    top_expert_groups: int
    normalize_top_k: bool
    weight_scale: float
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
            raise ModelNotFound(
                folder,
                f"There is no model folder at {folder}; hotset downloads nothing, "
                "`hf download NAME --local-dir FOLDER` fetches a model first.",
            )
        if is_unfinished_pack(folder):
            raise ModelNotFound(
                folder, f"{folder} is a pack that was interrupted: the same `hotset pack` command completes it."
            )
        if not path.is_file():
            raise ModelNotFound(folder, f"{folder} is not a model folder: it has no config.json.")
        file = ConfigFile.read(path)
        family = options.family_of(file)
        options.refuse_unsupported(file, family)
        rope = Rope.of(file, family.rope_theta)

        num_layers = file.count("num_hidden_layers")
        latent = LatentAttention.of(file) if family.latent_attention else None
        num_heads, num_kv_heads, head_dim = options.heads(file, latent)
        query_dim = head_dim if latent is None else latent.query_dim
        num_experts, experts_per_token = options.expert_counts(file, family)
        expert_groups, top_expert_groups = options.expert_groups(file, family, num_experts, experts_per_token)
        dense_layers = options.dense_layers(file, num_layers)
        return cls(
            family=family,
            vocab_size=file.count("vocab_size"),
            hidden_size=file.count("hidden_size"),
            intermediate_size=file.count(family.expert_size_option),
            dense_layers=dense_layers,
            dense_intermediate_size=file.count("intermediate_size") if dense_layers else 0,
            shared_intermediate_size=options.shared_intermediate_size(file, family),
            latent=latent,
            biased=family.biased if options.has_bias(file, family) else (),
            expert_layout=options.expert_layout(file, family),
            windows=options.windows(file, family, num_layers),
            mxfp4_experts=options.has_mxfp4_experts(file, family),
            swiglu_limit=file.number("swiglu_limit", default=family.swiglu_limit) if family.swiglu_limit else 0.0,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            attention_scale=query_dim**-0.5 * (1.0 if latent is None else rope.score_magnitude),
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            expert_groups=expert_groups,
            top_expert_groups=top_expert_groups,
            normalize_top_k=file.flag("norm_topk_prob", default=family.normalize_top_k),
            weight_scale=options.weight_scale(file, family),
            rope=rope,
            rope_interleaved=file.flag("rope_interleave", default=family.rope_interleaved),
            rms_norm_eps=file.number("rms_norm_eps", default=family.rms_norm_eps),
            max_position_embeddings=file.count("max_position_embeddings", default=4096),
            tie_word_embeddings=file.flag("tie_word_embeddings"),
            bos_token_id=next(iter(file.integers("bos_token_id")), None),
            eos_token_ids=tuple(sorted({*file.integers("eos_token_id"), *options.end_of_text(folder, family)})),
            clip_qkv=file.optional_number("clip_qkv"),
            dtype=options.dtype_of(file),
        )

    @property
    def rotary_dim(self) -> int:
        """How many of a head's numbers rotate."""
        return self.head_dim if self.latent is None else self.latent.rotary_dim

    @property
    def mixed_dim(self) -> int:
        """Of a head's mixture of values, as it is stored."""
        return self.head_dim if self.latent is None else self.latent.rank

    @property
    def widest_feed_forward(self) -> int:
        """The largest inner size of a block with dense weights; 0 if all feed-forward blocks are experts."""
        return max(self.dense_intermediate_size, self.shared_intermediate_size)

    @property
    def expert_layers(self) -> list[int]:
        """Those that have experts, in order."""
        return [layer for layer in range(self.num_layers) if layer not in self.dense_layers]

    @property
    def num_experts_in_all(self) -> int:
        """Of all layers that have experts."""
        return (self.num_layers - len(self.dense_layers)) * self.num_experts

    def layer_with_experts(self, layer: int) -> int:
        """`layer` as a user gives it; raises `ValueError` if it is none that has experts."""
        layer = integer("layer", layer)
        if not 0 <= layer < self.num_layers or layer in self.dense_layers:
            raise ValueError(f"layer is {layer}, expected one of {self.num_layers} that has experts")
        return layer

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
            keys_are_values=self.latent is not None,
        )

    def kv_nbytes_per_token(self, kv_format: KvFormat) -> int:
        """In all layers."""
        return self.kv_groups.num_groups * self.kv_page_layout(1, kv_format).page_nbytes
