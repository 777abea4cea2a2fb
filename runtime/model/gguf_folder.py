"""A GGUF file as a model folder: what every process needs to know of it, read once and kept in a cache.

llama.cpp's metadata become config.json (gguf_config.py), its vocabulary tokenizer.json (gguf_tokenizer.py), and
tensors.json says where in the GGUF file each weight lies (gguf_tensors.py); the weights themselves stay where they are.
So nothing else knows the format, and only the first process that opens a file reads its metadata, which takes seconds
for large vocabularies.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import xxhash

from hotset.runtime.model.errors import CorruptCheckpoint, UnsupportedModel
from hotset.runtime.model.gguf_config import ARCHITECTURES, model_config, refuse_unsupported, tokenizer_config
from hotset.runtime.model.gguf_file import GgufFile, gguf_parts
from hotset.runtime.model.gguf_tensors import stored_tensors
from hotset.runtime.model.model_cache import cache_root
from hotset.runtime.model.tensor_index import TENSORS_JSON

_VERSION: Final = 4  # of what these modules write


def model_folder(model: Path) -> Path:
    """Absolute path of the folder with a model: itself, or what stands for a GGUF file."""
    return gguf_folder(model) if model.suffix == ".gguf" else model.absolute()


def gguf_folder(path: Path) -> Path:
    """The model folder that stands for a GGUF file (or any part of one); made on first use, in the user's cache.

    Raises ModelNotFound, UnsupportedModel or CorruptCheckpoint.
    """
    parts = gguf_parts(path)
    states = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    identity = xxhash.xxh3_64_hexdigest(msgspec.json.encode((_VERSION, states)))
    folder = cache_root() / "gguf" / f"{parts[0].stem}-{identity}"
    if not (folder / TENSORS_JSON).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            _write_folder(parts, made)
            made.rename(folder)
        except OSError:
            if not (folder / TENSORS_JSON).is_file():  # otherwise another process was quicker
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def _write_folder(parts: Sequence[Path], folder: Path) -> None:
    file = GgufFile.read(parts)
    path, metadata = file.path, file.metadata
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES or not metadata.get(f"{name}.expert_count"):
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(
            path,
            str(name),
            f"{path}: hotset cannot run the architecture {name}; of GGUF's it knows {known}, with experts.",
        )
    refuse_unsupported(path, name, metadata)
    stored = dict(stored_tensors(ARCHITECTURES[name], file.tensors, folder))
    config = model_config(path, name, metadata, file.tensors)
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(config)))
    from hotset.runtime.model.gguf_tokenizer import build_tokenizer

    try:
        tokenizer = build_tokenizer(path, metadata)
    except UnsupportedModel:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CorruptCheckpoint(path, f"{path} has a tokenizer that does not fit together: {error}.") from error
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_bytes(msgspec.json.encode(tokenizer_config(metadata)))
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template)
    (folder / TENSORS_JSON).write_bytes(msgspec.json.encode(stored))
