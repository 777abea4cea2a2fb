"""The sizes and options of a model, from Hugging Face's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from hotset.shm.kv_page_format import KvFormat, KvPageLayout

ARCHITECTURES: Final = ("OlmoeForCausalLM",)
DTYPES: Final = ("float32", "float16", "bfloat16")


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A supported model: whatever cannot be computed exactly as the model was trained is refused by `load`.

    `normalize_top_k`: the mixing weights of the chosen experts are divided by their sum. `clip_qkv`: queries,
    keys and values are clipped to plus or minus this value. `dtype` is what config.json declares; each tensor
    has its own.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    normalize_top_k: bool
    rope_theta: float
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
        if not folder.is_dir():
            raise ModelNotFound(folder, f"There is no model folder at {folder}.")
        if not path.is_file():
            raise ModelNotFound(folder, f"{folder} is not a model folder: it has no config.json.")
        options = _Options(path)
        options.refuse_unsupported()

        num_heads = options.count("num_attention_heads")
        hidden_size = options.count("hidden_size")
        num_kv_heads = options.count("num_key_value_heads", default=num_heads)
        head_dim = options.count("head_dim", default=hidden_size // num_heads)
        num_experts = options.count("num_experts")
        experts_per_token = options.count("num_experts_per_tok")
        if head_dim * num_heads != hidden_size or head_dim % 2:
            raise CorruptCheckpoint(
                path,
                f"{path}: {num_heads} heads of even size {head_dim} do not fill hidden_size {hidden_size}.",
            )
        if num_heads % num_kv_heads:
            raise CorruptCheckpoint(
                path, f"{path}: {num_heads} heads cannot share {num_kv_heads} key-value heads evenly."
            )
        if experts_per_token > num_experts:
            raise CorruptCheckpoint(
                path, f"{path}: num_experts_per_tok is {experts_per_token} but num_experts is {num_experts}."
            )
        generation_path = folder / "generation_config.json"
        generation = _Options(generation_path) if generation_path.is_file() else None
        eos_token_ids = {
            *options.token_ids("eos_token_id"),
            *(generation.token_ids("eos_token_id") if generation else ()),
        }
        return cls(
            architecture=options.architecture,
            vocab_size=options.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=options.count("intermediate_size"),
            num_layers=options.count("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            normalize_top_k=options.flag("norm_topk_prob"),
            rope_theta=options.rope_theta,
            rms_norm_eps=options.number("rms_norm_eps", default=1e-5),
            max_position_embeddings=options.count("max_position_embeddings", default=4096),
            tie_word_embeddings=options.flag("tie_word_embeddings"),
            bos_token_id=next(iter(options.token_ids("bos_token_id")), None),
            eos_token_ids=tuple(sorted(eos_token_ids)),
            clip_qkv=None if options.get("clip_qkv") is None else options.number("clip_qkv"),
            dtype=options.dtype,
        )

    def kv_page_layout(self, block_size: int, kv_format: KvFormat) -> KvPageLayout:
        """What a KV page of `block_size` tokens of this model looks like."""
        return KvPageLayout(
            num_layers=self.num_layers,
            block_size=block_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            format=kv_format,
        )


class _Options:
    """The keys of a config.json, with a clear error for each value of the wrong type."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._values = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except (msgspec.DecodeError, OSError) as error:
            raise CorruptCheckpoint(path, f"{path} cannot be read as a JSON object: {error}.") from error

    def get(self, key: str, default: object = None) -> object:
        value = self._values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if value is None:
            raise CorruptCheckpoint(self.path, f"{self.path} does not give {key}.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CorruptCheckpoint(self.path, f"{self.path}: {key} is {value!r}, expected a positive integer.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return self._positive(key, self.get(key, default))

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise CorruptCheckpoint(self.path, f"{self.path}: {key} is {value!r}, expected true or false.")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key, ())
        try:
            return (value,) if isinstance(value, int) else msgspec.convert(value, tuple[int, ...])
        except msgspec.ValidationError as error:
            raise CorruptCheckpoint(
                self.path, f"{self.path}: {key} is {value!r}, expected a token id or a list of them."
            ) from error

    def _positive(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CorruptCheckpoint(self.path, f"{self.path}: {key} is {value!r}, expected a positive number.")
        return float(value)

    @property
    def architecture(self) -> str:
        names = self.get("architectures", ())
        if isinstance(names, list) and names and isinstance(names[0], str):  # pyright: ignore[reportUnknownArgumentType]
            return names[0]
        return str(self.get("model_type", "unknown"))

    @property
    def dtype(self) -> str:
        return str(self.get("dtype", self.get("torch_dtype", "float32")))

    @property
    def _rope(self) -> Mapping[str, Any]:
        """transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling held the
        rest.
        """
        values = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(values, dict):
            raise CorruptCheckpoint(self.path, f"{self.path}: the rope parameters are {values!r}, expected an object.")
        return values  # pyright: ignore[reportUnknownVariableType]

    @property
    def rope_theta(self) -> float:
        return self._positive("rope_theta", self._rope.get("rope_theta", self.get("rope_theta", 10000.0)))

    def refuse_unsupported(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModel(
                self.path,
                self.architecture,
                f"{self.path}: hotset cannot run the architecture {self.architecture}; "
                f"it knows {', '.join(ARCHITECTURES)}.",
            )
        rope_type = self._rope.get("rope_type", self._rope.get("type", "default"))
        for option, value, supported in (
            ("dtype", self.dtype, DTYPES),
            ("hidden_act", self.get("hidden_act", "silu"), ("silu",)),
            ("attention_bias", self.get("attention_bias", False), (False,)),
            ("rope_scaling", rope_type, ("default",)),
            ("sliding_window", self.get("sliding_window"), (None,)),
            ("quantization_config", self.get("quantization_config"), (None,)),
        ):
            if value not in supported:
                choices = " or ".join("none" if choice is None else str(choice) for choice in supported)
                raise UnsupportedModel(
                    self.path, option, f"{self.path}: {option} is {value!r}; hotset supports only {choices}."
                )
