"""GGUF files of llama.cpp: the same logits as from the model folder that they were made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
from family_models import prompts
from gguf_factory import dequantized, through, tokenizer_metadata, write_gguf
from in_process_model import InProcessModel
from model_factory import MXFP4, make_model
from msgspec import structs
from safetensors.numpy import save_file

from hotset.runtime.config import TRAINED_MODEL
from hotset.runtime.model.chat_template import ChatTemplate
from hotset.runtime.model.checkpoint import Checkpoint
from hotset.runtime.model.config import ModelConfig
from hotset.runtime.model.errors import CorruptCheckpoint, ModelNotFound, UnsupportedModel
from hotset.runtime.model.gguf_folder import gguf_folder
from hotset.runtime.model.gguf_tokenizer import build_tokenizer
from hotset.runtime.model.tensors import dense_tensors
from hotset.runtime.model.tokenizer import Tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_kv_heads": 2, "vocab_size": 260, "tokenizer": True}
MODELS = {
    "olmoe": {"family": "olmoe", **SIZES, "num_kv_heads": 4},
    "qwen2_moe": {"family": "qwen2_moe", **SIZES, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"family": "qwen3_moe", **SIZES, "head_dim": 16},
    "mixtral": {"family": "mixtral", **SIZES},
    "gpt_oss": {"family": "gpt_oss", **SIZES, "head_dim": 16, "swiglu_limit": 7.0, "experts_per_token": 3},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def folder_of(name: str, tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", dtype="float32", **MODELS[name])  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_computes_what_its_dequantised_weights_compute(name: str, quantization: str, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    folder_of_file = gguf_folder(write_gguf(folder, tmp_path / "model.gguf", quantization))
    ids = prompts()[0]
    found = InProcessModel(folder_of_file).logits(ids)
    save_file(dequantized(folder, quantization), folder / "model.safetensors")
    np.testing.assert_array_equal(found, InProcessModel(folder).logits(ids))


def gpt_oss_in_mxfp4(tmp_path: Path) -> tuple[Path, Path]:
    """A model folder, and the GGUF file that llama.cpp's converter would make of it."""
    options = {**MODELS["gpt_oss"], "quantization_config": MXFP4}
    folder = make_model(tmp_path / "model", dtype="bfloat16", **options)  # type: ignore[arg-type]
    return folder, write_gguf(folder, tmp_path / "model.gguf", "BF16")


def test_mxfp4_experts_compute_what_they_do_in_the_order_of_transformers(tmp_path: Path) -> None:
    folder, path = gpt_oss_in_mxfp4(tmp_path)
    found, expected = InProcessModel(gguf_folder(path)), InProcessModel(folder)
    assert (found.checkpoint.expert_dtype(0, 0), expected.checkpoint.expert_dtype(0, 0)) == ("mxfp4_ggml", "mxfp4")
    for ids in prompts():
        np.testing.assert_array_equal(found.logits(ids), expected.logits(ids))


def test_mxfp4_experts_of_other_families(tmp_path: Path) -> None:
    """llama.cpp quantises experts of any model to it, if asked."""
    folder = folder_of("qwen3_moe", tmp_path)
    experts = {f"blk.{layer}.ffn_{part}_exps.weight": "MXFP4" for layer in range(2) for part in ("gate", "up", "down")}
    found = InProcessModel(gguf_folder(write_gguf(folder, tmp_path / "model.gguf", "F32", **experts)))
    assert found.checkpoint.expert_dtype(1, 3) == "mxfp4_ggml"
    weights = {name: found.checkpoint.dense(name) for name in dense_tensors(found.config)}
    of_experts = {name: values for name, values in dequantized(folder, "MXFP4").items() if ".experts." in name}
    save_file(weights | of_experts, folder / "model.safetensors")
    np.testing.assert_array_equal(found.logits(prompts()[0]), InProcessModel(folder).logits(prompts()[0]))


def test_all_of_gpt_oss_that_is_not_in_the_metadata_is_as_it_was_trained(tmp_path: Path) -> None:
    folder, path = gpt_oss_in_mxfp4(tmp_path)
    found, expected = ModelConfig.load(gguf_folder(path)), ModelConfig.load(folder)
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps, rel=1e-7)  # float32 in the metadata
    stored = {"mxfp4_experts": False, "expert_layout": "gate_up_down_with_biases", "dtype": found.dtype}
    assert found == structs.replace(expected, rms_norm_eps=found.rms_norm_eps, **stored)
    assert found.windows == (20, 0)
    assert not found.rope.whole_dimensions


def test_control_tokens_by_which_gpt_oss_ends_an_answer_end_it(tmp_path: Path) -> None:
    folder = folder_of("gpt_oss", tmp_path)
    metadata = tokenizer_metadata(folder)
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for id, token in ((250, "<|return|>"), (251, "<|message|>"), (252, "<|call|>")):
        tokens[id], types[id] = token, 3
    options = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.pre": "gpt-4o"}
    file = gguf_folder(write_gguf(folder, tmp_path / "model.gguf", "F32", **options))
    assert ModelConfig.load(file).eos_token_ids == (0, 250, 252)
    assert Tokenizer(file).encode("a<|call|>").tolist()[-1] == 252


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.attn_factor", 0.5),
        ("rope.dimension_count", 8),
        ("expert_weights_scale", 2.5),
        ("final_logit_softcapping", 30.0),
    ],
)
def test_a_key_that_changes_what_is_computed_is_refused_by_name(key: str, value: float, tmp_path: Path) -> None:
    path = write_gguf(folder_of("qwen3_moe", tmp_path), tmp_path / "model.gguf", "F32", **{f"qwen3moe.{key}": value})
    with pytest.raises(UnsupportedModel, match=f"qwen3moe.{key} is {value}; hotset supports only") as refusal:
        gguf_folder(path)
    assert refusal.value.option == f"qwen3moe.{key}"


def test_a_tensor_that_nothing_is_known_of_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    writer.add_uint32("qwen3moe.expert_count", 8)
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"does not know what the tensor rope_freqs\.weight is for"):
        gguf_folder(tmp_path / "model.gguf")


def test_the_tokenizer_comes_from_the_file(tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path)
    found = Tokenizer(gguf_folder(write_gguf(folder, tmp_path / "model.gguf", "F16")))
    text = "def f(x):\n    return 'ä€'<|endoftext|>"
    assert found.encode(text).tolist() == Tokenizer(folder).encode(text).tolist()
    assert found.decode(found.encode(text)) == "def f(x):\n    return 'ä€'"


def test_pairs_merge_as_in_the_models_tokenizer() -> None:
    metadata = {key: value for key, value in tokenizer_metadata(TRAINED_MODEL).items() if value is not None}
    found = build_tokenizer(Path("model.gguf"), metadata)
    text = Path(__file__).read_text()
    assert found.encode(text).ids == Tokenizer(TRAINED_MODEL).encode(text).tolist()


def test_merges_of_sentence_piece_follow_from_the_scores() -> None:
    """The longest likely pieces win; what has no piece falls back on bytes, and the text comes back."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc"]
    count = len(pieces)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * (count - 9) + [-9, -8, -7, -6, -3, -2, -5, -1, -4],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 9,
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = build_tokenizer(Path("model.gguf"), metadata)
    assert tokenizer.encode("abc ab").tokens == ["<s>", "▁", "abc", "▁ab"]  # b c, then a bc
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc é ab").ids) == "abc é ab"


def test_a_dense_matrix_in_another_format_is_converted(tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path)
    path = write_gguf(folder, tmp_path / "model.gguf", "Q8_0", **{"output.weight": "Q5_0"})
    found = InProcessModel(gguf_folder(path)).logits(prompts()[0])
    weights = dequantized(folder, "Q8_0")
    head = InProcessModel(folder).checkpoint.dense("lm_head.weight")
    weights["lm_head.weight"] = through(through(head, "Q5_0"), "Q8_0")
    save_file(weights, folder / "model.safetensors")
    np.testing.assert_array_equal(found, InProcessModel(folder).logits(prompts()[0]))


def test_experts_in_a_format_without_a_kernel_are_refused_with_what_helps(tmp_path: Path) -> None:
    path = write_gguf(folder_of("qwen3_moe", tmp_path), tmp_path / "model.gguf", "Q5_0")
    with pytest.raises(UnsupportedModel, match=r"experts\.0\.gate_proj.* is stored as q5_0") as refusal:
        Checkpoint.open(gguf_folder(path))
    assert f"`hotset pack {path} OUT --format q8_0`" in str(refusal.value)


def test_experts_whose_matrices_differ_are_refused_with_what_helps(tmp_path: Path) -> None:
    others = {"blk.1.ffn_down_exps.weight": "Q8_0"}
    path = write_gguf(folder_of("qwen3_moe", tmp_path), tmp_path / "model.gguf", "Q4_0", **others)
    with pytest.raises(UnsupportedModel, match=r"down_proj.* is q8_0, other matrices.* q4_0.*`hotset pack"):
        Checkpoint.open(gguf_folder(path))


@pytest.mark.parametrize("part", [1, 2])
def test_a_file_in_several_parts_is_read_whole_whichever_is_named(part: int, tmp_path: Path) -> None:
    folder = folder_of("qwen3_moe", tmp_path)
    first = write_gguf(folder, tmp_path / "model.gguf", "F32", tensors_per_part=20)
    assert first.name == "model-00001-of-00002.gguf"
    found = InProcessModel(gguf_folder(tmp_path / f"model-0000{part}-of-00002.gguf")).logits(prompts()[0])
    np.testing.assert_array_equal(found, InProcessModel(folder).logits(prompts()[0]))


def test_a_part_that_is_missing_or_another_one_is_named(tmp_path: Path) -> None:
    first = write_gguf(folder_of("qwen3_moe", tmp_path), tmp_path / "model.gguf", "F32", tensors_per_part=20)
    second = tmp_path / "model-00002-of-00002.gguf"
    second.rename(tmp_path / "kept")
    with pytest.raises(ModelNotFound, match=r"model-00002-of-00002\.gguf, one of 2 parts"):
        gguf_folder(first)
    shutil.copy(first, second)
    with pytest.raises(CorruptCheckpoint, match=r"00002\.gguf says it is part 1 of 2, by its name it is part 2"):
        gguf_folder(first)
    first.rename(tmp_path / "alone.gguf")
    with pytest.raises(CorruptCheckpoint, match=r"alone\.gguf says it is part 1 of 2"):
        gguf_folder(tmp_path / "alone.gguf")


def test_what_is_no_model_of_ours_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nowhere\.gguf"):
        gguf_folder(tmp_path / "nowhere.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"no GGUF at all" * 100)
    with pytest.raises(CorruptCheckpoint, match=r"noise\.gguf cannot be read as a GGUF file"):
        gguf_folder(tmp_path / "noise.gguf")
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.add_uint32("mamba.block_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match="architecture mamba"):
        gguf_folder(tmp_path / "mamba.gguf")


def test_a_truncated_file_is_noticed_when_it_is_opened(tmp_path: Path) -> None:
    path = write_gguf(folder_of("olmoe", tmp_path), tmp_path / "model.gguf", "F32")
    folder = gguf_folder(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    with pytest.raises(CorruptCheckpoint, match="is truncated"):
        InProcessModel(folder)
    with pytest.raises(CorruptCheckpoint):
        InProcessModel(gguf_folder(path))


def test_a_chat_template_has_the_special_tokens(tmp_path: Path) -> None:
    options = {"tokenizer.chat_template": "{{ bos_token }}|{{ messages[0].content }}", "tokenizer.ggml.bos_token_id": 3}
    folder = gguf_folder(write_gguf(folder_of("olmoe", tmp_path), tmp_path / "model.gguf", "F32", **options))
    beginning = Tokenizer(folder).decode([3])
    assert beginning
    rendered = ChatTemplate.load(folder).render([{"role": "user", "content": "Hi"}])
    assert rendered == f"{beginning}|Hi"


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-4o"])
def test_text_is_cut_as_the_models_tokenizer_cuts_it(pre: str, tmp_path: Path) -> None:
    """With no merges every byte is a token: what matters here is that all of a text comes back."""
    path = write_gguf(folder_of("olmoe", tmp_path), tmp_path / "model.gguf", "F32", **{"tokenizer.ggml.pre": pre})
    tokenizer = Tokenizer(gguf_folder(path))
    text = "It's 12345 naïve  tests,\n\n\tcamelCase HTTPServer déjà-vu"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gpt_4o_cuts_at_capitals_and_every_three_digits(tmp_path: Path) -> None:
    options = {"tokenizer.ggml.pre": "gpt-4o"}
    path = write_gguf(folder_of("olmoe", tmp_path), tmp_path / "model.gguf", "F32", **options)
    tokenizer = tokenizers.Tokenizer.from_file(str(gguf_folder(path) / "tokenizer.json"))
    text = "It's 12345 HTTPServer camelCase  a/b//\n\n x"
    cuts = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    expected = ["It's", " ", "123", "45", " HTTPServer", " camel", "Case", " ", " a", "/b", "//\n\n", " x"]
    assert cuts == expected


def test_an_unknown_way_to_cut_text_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(folder_of("olmoe", tmp_path), tmp_path / "model.gguf", "F32", **{"tokenizer.ggml.pre": "odd"})
    with pytest.raises(UnsupportedModel, match="'odd'"):
        gguf_folder(path)
