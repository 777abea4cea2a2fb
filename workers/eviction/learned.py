"""What td eviction has learned of a model, kept in the model's cache folder beside its heat file.

The pager writes it every minute and when its instance closes; a later instance, or the successor of a killed pager,
begins with it. What is kept are the weights: of streams and what is resident nothing is.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.model_cache import model_cache, replace_file
from hotset.workers.background_writer import BackgroundWriter
from hotset.workers.eviction import _core

FILE_NAME = "td.safetensors"
FEATURES = "3"  # counts up when core/td.h changes what a weight means
MOST = 8.0  # no weight that has not diverged is near it


class UnusableLearned(HotsetError):
    """There is a file at `path`, but it is damaged or of a model of another shape."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"what td eviction learned is not used, {path}: {problem}")
        self.path = path


class Learned(msgspec.Struct, frozen=True):
    """A copy of a td policy's weights; the shapes are `Policy.learned_shapes`.

    Attributes:
        sets: uint8 [layers, sets, experts, bytes of a row]; core/td_rows.h knows what is in a row.
        traits: float32 [layers, traits, experts padded].
        leads: whether its values, and not affinity's, decided who goes.
    """

    sets: npt.NDArray[np.uint8]
    traits: npt.NDArray[np.float32]
    leads: bool

    @staticmethod
    def path(model: Path) -> Path:
        return model_cache(model) / FILE_NAME

    @classmethod
    def of(cls, policy: _core.Policy) -> Learned:
        sets_shape, traits_shape = policy.learned_shapes
        learned = cls(np.empty(sets_shape, np.uint8), np.empty(traits_shape, np.float32), policy.td_leads)
        policy.learned(learned.sets, learned.traits)
        return learned

    def teach(self, policy: _core.Policy) -> None:
        policy.set_learned(self.sets, self.traits, self.leads)

    @classmethod
    def load(cls, model: Path, policy: _core.Policy) -> Learned | None:
        """Of the model folder or file, for a policy of its shape; None if nothing has been learned yet.

        Raises `UnusableLearned`.
        """
        path = cls.path(model)
        try:
            opened: Any = safe_open(path, "np")
            with opened as file:
                metadata: dict[str, str] = file.metadata() or {}
                arrays: list[Any] = [file.get_tensor(name) for name in ("sets", "traits")]
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            raise UnusableLearned(path, str(error)) from None
        if metadata.get("features") != FEATURES:
            raise UnusableLearned(path, f"its features are {metadata.get('features')}, expected {FEATURES}")
        for array, dtype, shape in zip(arrays, (np.uint8, np.float32), policy.learned_shapes, strict=True):
            if array.dtype != dtype or array.shape != shape:
                expected = f"{np.dtype(dtype)} {list(shape)}"
                raise UnusableLearned(path, f"weights are {array.dtype} {list(array.shape)}, expected {expected}")
        if not np.all(np.abs(arrays[1]) < MOST):  # false for NaN
            raise UnusableLearned(path, f"not all weights are numbers between -{MOST:g} and {MOST:g}")
        return cls(*arrays, metadata.get("leads") == "True")

    def save(self, model: Path) -> None:
        """Replaces the file. Raises `OSError`."""
        metadata = {"features": FEATURES, "leads": str(self.leads)}
        replace_file(self.path(model), save({"sets": self.sets, "traits": self.traits}, metadata))


class LearnedKeeper:
    """Loads what was learned into a policy, and saves what it has learned since.

    Args:
        model: the folder or file served.
        policy: of any kind; nothing is kept of those that do not learn.
        enabled: otherwise the file is neither read nor written.

    Attributes:
        refused: whether there is a file that is of no use.
    """

    def __init__(self, model: Path, policy: _core.Policy, *, enabled: bool) -> None:
        self.refused = False
        self._problem: str | None = None
        self._model = model
        self._policy = policy
        self._writer = BackgroundWriter(f"what td eviction learned of {model}")
        self._enabled = enabled and policy.learns
        self._saved = 0  # steps of the policy then
        if not self._enabled:
            return
        try:
            learned = Learned.load(model, policy)
        except (UnusableLearned, OSError) as error:
            self.refused, self._problem = True, str(error)
            return
        if learned is not None:
            learned.teach(policy)

    def save(self, *, wait: bool) -> None:
        """Writes the file, if there is something new, beside the pager's work: for a large model it is tens of MB.

        With `wait` it is written when this returns.
        """
        if wait:
            self._writer.wait()
        if self._enabled and self._policy.steps != self._saved and self._writer.is_free():
            self._saved = self._policy.steps
            self._writer.begin(partial(Learned.of(self._policy).save, self._model))
            if wait:
                self._writer.wait()

    def take_problem(self) -> str | None:
        """Why the file is not used, or why it cannot be written; said once."""
        problem, self._problem = self._problem, None
        return problem or self._writer.take_problem()
