"""The architectures that hotset runs, each as a table of what sets it apart from the others.

Reading config.json (config.py), naming tensors (tensors.py) and the forward pass (workers/compute/transformer.py) are
written once and ask this table; nothing else knows a model by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

import msgspec


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What is particular about an architecture. The defaults are what most of them do.

    Attributes:
        name: for people.
        architecture: the first of `architectures` in config.json.
        expert_count_option: the key of config.json with the number of experts of a layer.
        expert_size_option: the key with the inner size of an expert.
        expert_block: where a layer keeps its router and experts.
        expert_matrices: the names of an expert's gate, up and down projection.
        interleaved_experts: instead, rows of gate and up alternate in one matrix, and both matrices have biases; in
            GGUF files they are three matrices with biases.
        mxfp4_experts: experts may be stored as MXFP4.
        swiglu_limit: where config.json does not give it; 0 is a plain silu(gate) * up.
        router, router_bias: the router's name, and whether it has a bias.
        gating: how logits become mixing weights; but for "top_k_softmax", config.json says whether they are normalised.
        normalize_top_k: where config.json does not say whether they are.
        routed_scaling_factor: a factor on them, where config.json does not give it; 0: there is none.
        grouped_by: experts come in groups, of which a token uses the best, where topk_method is this.
        selection_bias: the gate has a bias that only chooses experts, and does not weigh them.
        windows: which layers see only the last `sliding_window` positions: "all", those "given" in layer_types, where
            "alternating" has a default, or none, and then the option is refused.
        window_switch: the window counts only if config.json says use_sliding_window.
        sinks: each head has a logit of its own in the softmax, to attend to nothing.
        query_key_norm: queries and keys are normalised before they are rotated: "row" over all heads at once, "head"
            each head by itself.
        bias_option: the key of config.json that gives `biased` projections of the attention a bias, if there is one;
            `bias_default` is its value where it is not given.
        shared_expert: besides the chosen experts there is one that every row goes through: "gated" behind a gate of its
            own, "added" as it is, and as wide as `n_shared_experts` of the others.
        latent_attention: keys and values are projected from a latent vector (latent_attention.py).
        rope_interleaved: where config.json does not say whether neighbours rotate together.
        only: what options may be, the first where config.json does not give it.
        end_of_text: further tokens that end an answer, by their names in tokenizer_config.json; the
            generation_config.json of converted checkpoints does not have them all.
        rope_theta, rms_norm_eps: where config.json does not give them.
    """

    name: str
    architecture: str
    expert_count_option: str = "num_experts"
    expert_size_option: str = "moe_intermediate_size"
    expert_block: str = "mlp"
    expert_matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved_experts: bool = False
    mxfp4_experts: bool = False
    swiglu_limit: float = 0.0
    router: str = "gate"
    router_bias: bool = False
    gating: Literal["softmax_top_k", "top_k_softmax", "sigmoid"] = "softmax_top_k"
    normalize_top_k: bool = False
    routed_scaling_factor: float = 0.0
    grouped_by: str | None = None
    selection_bias: bool = False
    windows: Literal["none", "all", "given", "alternating"] = "none"
    window_switch: bool = False
    sinks: bool = False
    query_key_norm: Literal["none", "row", "head"] = "none"
    bias_option: str | None = "attention_bias"
    bias_default: bool = False
    biased: tuple[str, ...] = ("query", "key", "value", "output")
    shared_expert: Literal["none", "gated", "added"] = "none"
    latent_attention: bool = False
    rope_interleaved: bool = False
    only: Mapping[str, tuple[object, ...]] = {}
    end_of_text: tuple[str, ...] = ()
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


OLMOE: Final = Family(
    name="OLMoE",
    architecture="OlmoeForCausalLM",
    expert_size_option="intermediate_size",
    query_key_norm="row",
    rms_norm_eps=1e-5,
)
QWEN3_MOE: Final = Family(
    name="Qwen3-MoE",
    architecture="Qwen3MoeForCausalLM",
    query_key_norm="head",
    windows="all",
    window_switch=True,
)
QWEN2_MOE: Final = Family(
    name="Qwen2-MoE",
    architecture="Qwen2MoeForCausalLM",
    bias_option="qkv_bias",
    bias_default=True,
    biased=("query", "key", "value"),
    shared_expert="gated",
    windows="given",
    window_switch=True,
)
MIXTRAL: Final = Family(
    name="Mixtral",
    architecture="MixtralForCausalLM",
    expert_size_option="intermediate_size",
    expert_block="block_sparse_moe",
    expert_matrices=("w1", "w3", "w2"),
    gating="top_k_softmax",
    windows="all",
    bias_option=None,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
)
GPT_OSS: Final = Family(
    name="gpt-oss",
    architecture="GptOssForCausalLM",
    expert_size_option="intermediate_size",
    interleaved_experts=True,
    mxfp4_experts=True,
    swiglu_limit=7.0,
    router="router",
    router_bias=True,
    gating="top_k_softmax",
    windows="alternating",
    sinks=True,
    bias_default=True,
    end_of_text=("<|return|>", "<|call|>", "<|endoftext|>"),
    rope_theta=150000.0,
    rms_norm_eps=1e-5,
)

# What is not in `only` of these two: transformers, DeepSeek's own code and llama.cpp disagree on it, and no published
# model has it.
DEEPSEEK_V2: Final = Family(
    name="DeepSeek-V2",
    architecture="DeepseekV2ForCausalLM",
    expert_count_option="n_routed_experts",
    routed_scaling_factor=1.0,
    grouped_by="group_limited_greedy",
    biased=("query_down", "latent", "output"),
    shared_expert="added",
    latent_attention=True,
    rope_interleaved=True,
    only={
        "topk_method": ("greedy", "group_limited_greedy"),
        "scoring_func": ("softmax",),
        "norm_topk_prob": (False,),
        "moe_layer_freq": (1,),
        "rope_interleave": (True,),
    },
)
DEEPSEEK_V3: Final = Family(
    name="DeepSeek-V3",
    architecture="DeepseekV3ForCausalLM",
    expert_count_option="n_routed_experts",
    gating="sigmoid",
    normalize_top_k=True,
    routed_scaling_factor=2.5,
    grouped_by="noaux_tc",
    selection_bias=True,
    biased=("query_down", "latent", "output"),
    shared_expert="added",
    latent_attention=True,
    rope_interleaved=True,
    only={"topk_method": ("noaux_tc",), "scoring_func": ("sigmoid",), "moe_layer_freq": (1,)},
)

FAMILIES: Final = {
    family.architecture: family for family in (OLMOE, MIXTRAL, QWEN2_MOE, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3)
}
