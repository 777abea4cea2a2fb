"""A tokenizer from a GGUF file's metadata (`tokenizer.ggml.*`), as one of the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from hotset.runtime.model.errors import CorruptCheckpoint, UnsupportedModel
from hotset.runtime.model.gguf_config import CONTROL

USER_DEFINED: Final = 4  # of llama.cpp's token types

_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_OF_GPT_4O: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS + r"?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS + r"?"
)
# How text is cut before pairs are merged, by the name in tokenizer.ggml.pre. None: as GPT-2 does it.
_SPLITS: Final[Mapping[str, str | None]] = {
    "default": None,
    "gpt-2": None,
    "olmo": None,
    "dbrx": None,
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    "gpt-4o": _WORD_OF_GPT_4O + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """`metadata`: the file's keys and values. Raises UnsupportedModel naming the kind of tokenizer."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise CorruptCheckpoint(path, f"{path} has no tokenizer: tokenizer.ggml.tokens is missing.")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(path, metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentence_piece(metadata, tokens)
    else:
        raise UnsupportedModel(
            path, "tokenizer.ggml.model", f"{path}: its tokenizer is {kind!r}; hotset reads gpt2 and llama."
        )
    types = metadata.get("tokenizer.ggml.token_type", ())
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (CONTROL, USER_DEFINED):
            _add(tokenizer, AddedToken(token, special=token_type == CONTROL, normalized=False))
    first = metadata.get("tokenizer.ggml.bos_token_id")
    if first is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        begin = tokens[first]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{begin} $A", special_tokens=[(begin, int(first))]
        )
    return tokenizer


def _add(tokenizer: Any, token: AddedToken) -> None:
    """Untyped: the library's own annotations are incomplete."""
    (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE, as GPT-2 and nearly all later models have it."""
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise UnsupportedModel(
            path,
            "tokenizer.ggml.pre",
            f"{path}: its tokenizer cuts text in the manner {name!r}; hotset knows {', '.join(_SPLITS)}.",
        )
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))  # type: ignore[arg-type]
    split = _SPLITS[name]
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with bytes to fall back on, as Llama 2 and Mixtral have it.

    Its merges are not in the file: a pair merges if the whole is a token, the likeliest whole first (the same
    reconstruction as in transformers' LlamaConverter).
    """
    scores = metadata["tokenizer.ggml.scores"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, number in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[number], left, right, (token[:cut], token[cut:])))
    merges = [pair for *_, pair in sorted(pairs)]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    begin = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*begin, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    end = [decoders.Strip(content=" ", left=1)] if begin else []
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return tokenizer
