"""The dense tensors of a model: name and shape in the checkpoint of each part of the forward pass.

A part that a model does not have is absent here, and only here is decided which there are. Experts: expert_parts.py.
"""

from __future__ import annotations

import msgspec

from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.latent_attention import LatentAttention


class Tensor(msgspec.Struct, frozen=True):
    """`of_bytes`: its elements are not numbers but bytes of packed ones."""

    name: str
    shape: tuple[int, ...]
    of_bytes: bool = False


def model_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The parts outside of the layers: embedding, norm, head."""
    embedding = Tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    return {
        "embedding": embedding,
        "norm": Tensor("model.norm.weight", (config.hidden_size,)),
        "head": embedding
        if config.tie_word_embeddings
        else Tensor("lm_head.weight", (config.vocab_size, config.hidden_size)),
    }


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The parts of one layer, without its experts."""
    hidden = config.hidden_size
    prefix = f"model.layers.{layer}"
    attention, experts = f"{prefix}.self_attn", f"{prefix}.{config.family.expert_block}"
    parts = {
        "input_norm": Tensor(f"{prefix}.input_layernorm.weight", (hidden,)),
        "feed_forward_norm": Tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
    }
    parts |= _heads(config, attention) if config.latent is None else _latent_heads(config, config.latent, attention)
    for part in config.biased:
        if part in parts:
            weight = parts[part]
            parts[f"{part}_bias"] = Tensor(weight.name.removesuffix("weight") + "bias", weight.shape[:1])
    if config.family.sinks:
        parts["sinks"] = Tensor(f"{attention}.sinks", (config.num_heads,))
    if layer in config.dense_layers:
        parts |= _feed_forward("dense", f"{prefix}.mlp", hidden, config.dense_intermediate_size)
    else:
        router = f"{experts}.{config.family.router}"
        parts["router"] = Tensor(f"{router}.weight", (config.num_experts, hidden))
        if config.family.router_bias:
            parts["router_bias"] = Tensor(f"{router}.bias", (config.num_experts,))
        if config.family.selection_bias:
            parts["selection_bias"] = Tensor(f"{router}.e_score_correction_bias", (config.num_experts,))
        if config.family.shared_expert == "gated":
            parts |= _feed_forward("shared", f"{experts}.shared_expert", hidden, config.shared_intermediate_size)
            parts["shared_router"] = Tensor(f"{experts}.shared_expert_gate.weight", (1, hidden))
        elif config.family.shared_expert == "added":
            parts |= _feed_forward("shared", f"{experts}.shared_experts", hidden, config.shared_intermediate_size)
    return parts


def dense_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """All tensors that are not experts, by name."""
    groups = [model_tensors(config), *(layer_tensors(config, layer) for layer in range(config.num_layers))]
    return {tensor.name: tensor for parts in groups for tensor in parts.values()}


def _heads(config: ModelConfig, attention: str) -> dict[str, Tensor]:
    hidden, queries, keys = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    parts = {
        "query": Tensor(f"{attention}.q_proj.weight", (queries, hidden)),
        "key": Tensor(f"{attention}.k_proj.weight", (keys, hidden)),
        "value": Tensor(f"{attention}.v_proj.weight", (keys, hidden)),
        "output": Tensor(f"{attention}.o_proj.weight", (hidden, queries)),
    }
    if config.family.query_key_norm != "none":
        whole = config.family.query_key_norm == "row"
        parts["query_norm"] = Tensor(f"{attention}.q_norm.weight", (queries if whole else config.head_dim,))
        parts["key_norm"] = Tensor(f"{attention}.k_norm.weight", (keys if whole else config.head_dim,))
    return parts


def _latent_heads(config: ModelConfig, latent: LatentAttention, attention: str) -> dict[str, Tensor]:
    """`latent` is to the latent vector and the rotated part of keys; `from_latent` has, for each head, the rows of its
    keys and those of its values.
    """
    hidden, heads = config.hidden_size, config.num_heads
    queries = heads * latent.query_dim
    parts = {
        "latent": Tensor(f"{attention}.kv_a_proj_with_mqa.weight", (latent.row_dim, hidden)),
        "latent_norm": Tensor(f"{attention}.kv_a_layernorm.weight", (latent.rank,)),
        "from_latent": Tensor(
            f"{attention}.kv_b_proj.weight", (heads * (latent.plain_dim + latent.value_dim), latent.rank)
        ),
        "output": Tensor(f"{attention}.o_proj.weight", (hidden, heads * latent.value_dim)),
    }
    if not latent.query_rank:
        return parts | {"query": Tensor(f"{attention}.q_proj.weight", (queries, hidden))}
    return parts | {
        "query_down": Tensor(f"{attention}.q_a_proj.weight", (latent.query_rank, hidden)),
        "query_norm": Tensor(f"{attention}.q_a_layernorm.weight", (latent.query_rank,)),
        "query": Tensor(f"{attention}.q_b_proj.weight", (queries, latent.query_rank)),
    }


def _feed_forward(part: str, prefix: str, hidden: int, inner: int) -> dict[str, Tensor]:
    return {
        f"{part}_gate": Tensor(f"{prefix}.gate_proj.weight", (inner, hidden)),
        f"{part}_up": Tensor(f"{prefix}.up_proj.weight", (inner, hidden)),
        f"{part}_down": Tensor(f"{prefix}.down_proj.weight", (hidden, inner)),
    }
