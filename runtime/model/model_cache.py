"""Where hotset keeps what it makes or learns of a model: a folder of the user's cache for each model file or folder.

Everything in it can be deleted at any time and is made or learned again. Two instances of one model may write at the
same time, so whoever writes a file there replaces it whole (`replace_file`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

import xxhash

from hotset.runtime.errors import HotsetError

_WEIGHTS = (".safetensors", ".gguf", ".bin")
LEFT_BEHIND_SECONDS = 3600  # no write takes that long
_CONFIG = "config.json"  # other settings route the same weights in another way


class NoCacheFolder(HotsetError, OSError):
    """This user has no home folder, nor an XDG_CACHE_HOME."""

    def __init__(self) -> None:
        super().__init__("there is no folder to keep anything in: this user has no home, and XDG_CACHE_HOME is not set")


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/hotset`, or `~/.cache/hotset`; a path that is not absolute does not count, as XDG has it.

    Raises `NoCacheFolder`.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if root.is_absolute():
        return root / "hotset"
    try:
        return Path.home() / ".cache" / "hotset"
    except RuntimeError:
        raise NoCacheFolder from None


def model_cache(model: Path) -> Path:
    """The cache folder of a model folder or file. It need not exist; other weights or settings have another.

    Raises `NoCacheFolder`, or another `OSError` for what is not there.
    """
    return cache_root() / "models" / model_identity(model)


def model_identity(model: Path) -> str:
    """A name for the weights and settings at a path: others there have another. Raises `OSError`."""
    model = model.resolve()
    identity = [str(model)]
    if model.is_file():
        files = [model]
    else:
        files = sorted(file for file in model.iterdir() if file.suffix in _WEIGHTS or file.name == _CONFIG)
    for file in files:
        state = file.stat()
        identity.append(f"{file.name} {state.st_size} {state.st_mtime_ns}")
    return f"{model.stem}-{xxhash.xxh3_64_hexdigest(chr(10).join(identity).encode())}"


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that readers find the old content or the new one, never a part. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(made).replace(path)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise


def check_replaceable(path: Path) -> None:
    """Whether `replace_file` could write there now; raises `OSError` as that would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _remove_left_behind(path: Path) -> None:
    """What writers of this file had begun when they were killed."""
    for begun in path.parent.glob(f".{path.name}-*"):
        with contextlib.suppress(OSError):  # another instance does the same
            if time.time() - begun.stat().st_mtime > LEFT_BEHIND_SECONDS:
                begun.unlink()
