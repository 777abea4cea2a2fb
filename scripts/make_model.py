#!/usr/bin/env python3
"""Write a checkpoint with random weights, of any size, whose gate prefers some experts and depends on the input.

    .venv/bin/python -P scripts/make_model.py /tmp/six-gigabytes                 # Qwen3-MoE, 48 x 128 experts, 6 GB
    .venv/bin/python -P scripts/make_model.py /tmp/small --layers 4 --experts 16 --top-k 2

It stands in for models that are too large to ship: paging, memory limits and rates are real, the text is noise. The
same arguments write the same bytes. The tokenizer is that of the model that ships with hotset.

A gate row is the sum of two parts. One lies along the direction that all embeddings have in common, drawn once per
expert: it makes the expert popular or rare, by `--skew` standard deviations of the other part. That one is noise, by
which tokens differ. The other weights are scaled so that a layer adds little to the residual (as GPT-2's initialisation
does it): deep layers still see which token it is.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.errors import HotsetError
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.expert_parts import expert_parts
from hotset.runtime.model.tensors import Tensor, dense_tensors
from hotset.runtime.stop_signals import Stopped, stop_signals

VOCAB_SIZE = 2048  # of the shipped tokenizer
COMMON_SHARE = 0.5  # of an embedding's squared length lies along the common direction
SHARD_NBYTES = 2 * 10**9
ARCHITECTURES = {
    "olmoe": "OlmoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
}


def config_json(options: argparse.Namespace) -> dict[str, Any]:
    config = {
        "architectures": [ARCHITECTURES[options.family]],
        "model_type": options.family,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.expert_size,
        "moe_intermediate_size": options.expert_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden_size // 64,
        "num_key_value_heads": max(1, options.hidden_size // 256),
        "head_dim": 64,
        "num_experts": options.experts,
        "num_experts_per_tok": options.top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    return config | deepseek_options(options) if options.family == "deepseek_v2" else config


def deepseek_options(options: argparse.Namespace) -> dict[str, Any]:
    """Heads, latent vectors, shared experts and the first layer as in DeepSeek-V2-Lite."""
    num_heads = options.hidden_size // 128
    return {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": options.experts,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "intermediate_size": 8 * options.expert_size,
        "norm_topk_prob": False,
    }


class Weights:
    """Draws tensors in the order in which they are written; what each is for, its name tells."""

    def __init__(self, config: ModelConfig, skew: float, seed: int) -> None:
        self.config = config
        self.skew = skew
        self.random = np.random.Generator(np.random.SFC64(seed))
        common = self.random.standard_normal(config.hidden_size, dtype=np.float32)
        self.common = common / np.linalg.norm(common)

    def draw(self, tensor: Tensor) -> NDArray[np.float32]:
        if len(tensor.shape) == 1:
            return np.ones(tensor.shape, np.float32)  # norms
        inputs = tensor.shape[1]
        values = self.random.standard_normal(tensor.shape, dtype=np.float32)
        if "embed_tokens" in tensor.name:
            lengths = math.sqrt(COMMON_SHARE * inputs), math.sqrt(1 - COMMON_SHARE)
            return lengths[0] * self.common + lengths[1] * values
        if tensor.name.endswith("mlp.gate.weight"):
            # After the norm a hidden state has the length sqrt(inputs), COMMON_SHARE of its square along `common`.
            popularity = self.skew * self.random.standard_normal(tensor.shape[0], dtype=np.float32)
            values *= math.sqrt(1 / (inputs * (1 - COMMON_SHARE)))
            return values + popularity[:, None] * self.common / math.sqrt(inputs * COMMON_SHARE)
        values *= 1 / math.sqrt(inputs)
        if tensor.name.endswith(("o_proj.weight", "down_proj.weight")):
            values *= 1 / math.sqrt(2 * self.config.num_layers)
        return values


def tensors_of(config: ModelConfig) -> Iterator[Tensor]:
    """The dense tensors, then the experts one by one."""
    yield from dense_tensors(config).values()
    for layer in config.expert_layers:
        for expert in range(config.num_experts):
            yield from (part.tensor for part in expert_parts(config, layer, expert))


def shards_of(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of about SHARD_NBYTES together."""
    shard: list[Tensor] = []
    nbytes = 0
    for tensor in tensors:
        shard.append(tensor)
        nbytes += 2 * math.prod(tensor.shape)
        if nbytes >= SHARD_NBYTES:
            yield shard
            shard, nbytes = [], 0
    if shard:
        yield shard


def write_shard(file: BinaryIO, tensors: list[Tensor], weights: Weights) -> None:
    """The safetensors format, one tensor in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + 2 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        bits = weights.draw(tensor).view(np.uint32) >> np.uint32(16)  # bfloat16, cut off
        file.write(bits.astype(np.uint16).tobytes())


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Into a folder that `may_be_written`. Raises `OSError`, or `UnsupportedModel` for options that make none."""
    with unfinished(folder):
        (folder / "config.json").write_text(json.dumps(config_json(options), indent=2) + "\n")
        config = ModelConfig.load(folder)
        shards = list(shards_of(tensors_of(config)))
        needed = sum(2 * math.prod(tensor.shape) for shard in shards for tensor in shard)
        if needed > (free := shutil.disk_usage(folder).free):
            raise OSError(f"{folder} needs {needed} more bytes, its disk has {free} free")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TRAINED_MODEL / name, folder / name)
        weights = Weights(config, options.skew, options.seed)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            print(f"hotset: writing {name}", file=sys.stderr, flush=True)
            with (folder / name).open("wb") as file:
                write_shard(file, shard, weights)
            weight_map |= {tensor.name: name for tensor in shard}
        # Last: without it, what is there is not a model.
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


UNFINISHED = "make_model.unfinished"
"""An empty file that is there while the others are written."""
WRITTEN = ("model.safetensors.index.json", "model-*-of-*.safetensors", "tokenizer*.json", "config.json")


def may_be_written(folder: Path) -> bool:
    """Whether nothing is there, or no more than what a run left that was killed."""
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / UNFINISHED).exists() or not any(folder.iterdir()))


@contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """What is written meanwhile is whole in the end, or gone, with the folders that there were none of before. Of a run
    that is killed it stays, marked, and is removed by the next."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    mark = folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        remove_written(folder)
        yield
        mark.unlink()
    except BaseException:
        with suppress(OSError):  # what went wrong before is to be said
            remove_written(folder)
            mark.unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        raise


def remove_written(folder: Path) -> None:
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write a random checkpoint with a skewed, input-dependent gate.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=sorted(ARCHITECTURES), default="qwen3_moe")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128, help="per layer")
    parser.add_argument("--top-k", type=int, default=8, help="experts per token")
    parser.add_argument("--hidden-size", type=int, default=512, help="a multiple of 256")
    parser.add_argument("--expert-size", type=int, default=320, help="inner size of an expert")
    parser.add_argument("--skew", type=float, default=1.0, help="of the experts' popularity; 0: all alike")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name in ("layers", "experts", "top_k", "hidden_size", "expert_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1")
    if options.seed < 0:
        parser.error(f"--seed is {options.seed}, expected at least 0")
    if not 0 <= options.skew < math.inf:
        parser.error(f"--skew is {options.skew}, expected a number of at least 0")
    if options.hidden_size % 256:
        parser.error(f"--hidden-size is {options.hidden_size}, expected a multiple of 256")
    if options.top_k > options.experts:
        parser.error(f"--top-k is {options.top_k}, more than the {options.experts} experts")
    if not may_be_written(options.folder):
        parser.error(
            f"the folder is {str(options.folder)!r}, expected none, an empty one, or what a run left that was killed"
        )
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    stop_signals.install()
    try:
        with stop_signals:
            write_model(options.folder, options)
    except Stopped:
        print(f"make_model: {stop_signals.words}", file=sys.stderr)
        return stop_signals.status
    except (HotsetError, OSError) as error:
        print(f"make_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
