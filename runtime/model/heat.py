"""How warm each expert of a model is: what instances have seen so far, kept in the model's cache folder.

The pager writes it every so often and when its instance closes; the next instance begins with the experts that were
worth most. Other readers: precision by heat in `pack`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.model_cache import model_cache, replace_file

FILE_NAME = "heat.safetensors"
_DTYPES = {"earlier": np.uint64, "current": np.uint64, "affinity": np.float32, "ranking": np.int64}


class UnusableHeat(HotsetError):
    """There is a heat file at `path`, but it is damaged or of a model of another shape."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"the heat file {path} is ignored: {problem}")
        self.path = path


class Heat(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a model's experts. Arrays are [layers, experts] but for `ranking`.

    Of two instances that run at the same time, the counts of the one that writes last are kept.

    Attributes:
        instance: unique name of the instance that wrote this.
        earlier: uint64, activations by the instances before it; apart, so that it can write again.
        current: uint64, activations by this instance, all workers together.
        affinity: float32, the scores of runtime/affinity.py when this was written.
        ranking: int64, ids (layer * experts + expert), the one that is worth most first: those that were resident,
            then what earlier instances had. None twice.
    """

    instance: str
    earlier: npt.NDArray[np.uint64]
    current: npt.NDArray[np.uint64]
    affinity: npt.NDArray[np.float32]
    ranking: npt.NDArray[np.int64]

    @staticmethod
    def path(model: Path) -> Path:
        return model_cache(model) / FILE_NAME

    @classmethod
    def load(cls, model: Path, shape: tuple[int, int]) -> Heat | None:
        """Of the model folder or file, whose (layers, experts) are `shape`; None if no instance has served it yet.

        Raises `UnusableHeat`.
        """
        path = cls.path(model)
        try:
            opened: Any = safe_open(path, "np")
            with opened as file:
                metadata: dict[str, str] | None = file.metadata()
                arrays: dict[str, Any] = {name: file.get_tensor(name) for name in _DTYPES}
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            raise UnusableHeat(path, str(error)) from None
        heat = cls(instance=(metadata or {}).get("instance", ""), **arrays)
        if (problem := heat._problem(shape)) is not None:
            raise UnusableHeat(path, problem)
        return heat

    def save(self, model: Path) -> None:
        """Replaces the file. Raises `OSError`."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _DTYPES}
        replace_file(self.path(model), save(arrays, {"instance": self.instance}))

    @property
    def activations(self) -> npt.NDArray[np.uint64]:
        """How often each expert was selected, by all instances."""
        return self.earlier + self.current

    def percentiles(self) -> npt.NDArray[np.float64]:
        """Mid-rank of each expert's activations among all experts of the model, 0 to 1; 0.5 when all are equal.

        Layers in which nothing was ever selected, those without experts, are 0 and left out of the ranks.
        """
        activations = self.activations
        routed = activations.any(axis=1)
        counts = activations[routed].ravel()
        ordered = np.sort(counts)
        below, upto = (np.searchsorted(ordered, counts, side=side) for side in ("left", "right"))
        percentiles = np.zeros(activations.shape)
        percentiles[routed] = ((below + upto) / (2 * max(counts.size, 1))).reshape(-1, activations.shape[1])
        return percentiles

    def _problem(self, shape: tuple[int, int]) -> str | None:
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            expected = "any number of ids" if name == "ranking" else f"{list(shape)}"
            if array.dtype != dtype or (array.ndim != 1 if name == "ranking" else array.shape != shape):
                return f"{name} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} {expected}"
        count = shape[0] * shape[1]
        if self.ranking.size and not 0 <= int(self.ranking.min()) <= int(self.ranking.max()) < count:
            return f"its ranking names an expert that is not one of {count}"
        if len(np.unique(self.ranking)) != len(self.ranking):
            return "its ranking names an expert twice"
        if not np.all((self.affinity >= 0) & (self.affinity <= 1)):  # false for NaN
            return "its affinity scores are not all from 0 to 1"
        return None
