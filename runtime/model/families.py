"""The architectures that hotset runs, each as a table of what sets it apart from the others.

Reading config.json (config.py), naming tensors (tensors.py) and the forward pass (workers/compute/transformer.py) are
written once and ask this table; nothing else knows a model by its name.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """What is particular about an architecture. The defaults are what most of them do.

    Attributes:
        name: for people.
        architecture: the first of `architectures` in config.json.
        expert_size_option: the key of config.json with the inner size of an expert.
        query_key_norm: queries and keys are normalised before they are rotated: "row" over all heads at once, "head"
            each head by itself.
        bias_option: the key of config.json that gives `biased` projections of the attention a bias, if there is one;
            `bias_default` is its value where it is not given.
        shared_expert: besides the chosen experts there is one that every row goes through, behind a gate of its own.
        rope_theta, rms_norm_eps: where config.json does not give them.
    """

    name: str
    architecture: str
    expert_size_option: str = "moe_intermediate_size"
    query_key_norm: Literal["none", "row", "head"] = "none"
    bias_option: str | None = "attention_bias"
    bias_default: bool = False
    biased: tuple[str, ...] = ("query", "key", "value", "output")
    shared_expert: bool = False
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
)
QWEN2_MOE: Final = Family(
    name="Qwen2-MoE",
    architecture="Qwen2MoeForCausalLM",
    bias_option="qkv_bias",
    bias_default=True,
    biased=("query", "key", "value"),
    shared_expert=True,
)

FAMILIES: Final = {family.architecture: family for family in (OLMOE, QWEN2_MOE, QWEN3_MOE)}
