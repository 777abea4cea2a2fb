"""What can be wrong with a model folder."""

from __future__ import annotations

from pathlib import Path

from hotset.runtime.errors import HotsetError


class ModelError(HotsetError):
    """A model folder cannot be used. `path` is the folder or the file at fault."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class ModelNotFound(ModelError):
    """There is no model at `path`."""


class UnsupportedModel(ModelError):
    """The model is a valid one that hotset cannot run. `option` names the architecture or the setting."""

    def __init__(self, path: Path, option: str, message: str) -> None:
        super().__init__(path, message)
        self.option = option


class CorruptCheckpoint(ModelError):
    """A file of the folder contradicts the format, its own size or config.json. `tensor` is the first one
    hit, if any.
    """

    def __init__(self, path: Path, message: str, tensor: str | None = None) -> None:
        super().__init__(path, message)
        self.tensor = tensor
