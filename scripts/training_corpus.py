"""The corpus of the model that ships: Python's own standard library, split by whole files.

Needs nothing but Python, so that a benchmark can measure perplexity on the very files that
training has not seen.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

MAX_FILE_BYTES = 400_000
# Tables and data rather than code: code pages, the help text of pydoc, deliberately broken sources.
EXCLUDED_PARTS = frozenset({"site-packages", "dist-packages", "encodings", "pydoc_data", "data"})
HELDOUT_PER_MILLE = 40


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def corpus_files(root: Path | None = None) -> list[Path]:
    """Python sources of the standard library, relative to its root, sorted."""
    root = root or stdlib_root()
    files = (path.relative_to(root) for path in root.rglob("*.py") if path.stat().st_size <= MAX_FILE_BYTES)
    return sorted(
        path for path in files if not EXCLUDED_PARTS & set(path.parts) and not path.name.startswith("_sysconfigdata")
    )


def is_heldout(relative_path: Path) -> bool:
    digest = hashlib.sha256(relative_path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELDOUT_PER_MILLE


def heldout_files(root: Path | None = None) -> list[Path]:
    """The files that no training step and no tokenizer merge has seen, relative to the library's root."""
    return [path for path in corpus_files(root) if is_heldout(path)]


def training_files(root: Path | None = None) -> list[Path]:
    return [path for path in corpus_files(root) if not is_heldout(path)]


def read_texts(files: Sequence[Path], root: Path | None = None) -> Iterator[str]:
    """Texts of the files that are valid UTF-8 and not empty, with line ends as "\\n"."""
    root = root or stdlib_root()
    for path in files:
        try:
            text = (root / path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield text.replace("\r\n", "\n")


def heldout_stream(encode: Callable[[str], npt.NDArray[np.int32]], end_of_text: int) -> npt.NDArray[np.int32]:
    """The held-out files as token ids one after the other, an end-of-text token after each, as in training."""
    end = np.array([end_of_text], np.int32)
    return np.concatenate([part for text in read_texts(heldout_files()) for part in (encode(text), end)])
