"""Arguments that the commands in scripts share: what is no number, or none of those that do something, is refused."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from hotset.runtime.errors import HotsetError
from hotset.runtime.model.gguf_folder import model_folder

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """Its errors are one sentence, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        said = re.sub(r"^argument (\S+): it is", r"\1 is", message)
        self.exit(2, f"{self.prog}: {said}\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an argparse option that is an integer from `least` to `most`."""
    expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"it is {text!r}, expected {expected}")
        return number

    return parse


def positive(text: str) -> float:
    """The `type` of an argparse option that is a number of seconds, or of something a second."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"it is {text!r}, expected a number over 0")
    return number


def model_path(text: str) -> Path:
    """The `type` of an argparse option that names a model."""
    if not text:
        raise argparse.ArgumentTypeError("it is '', expected the path of a checkpoint folder or a GGUF file")
    try:
        return model_folder(Path(text))
    except HotsetError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def trace_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is '', expected the path of an .npz file or of a folder with events.csv")
    return Path(text)


def written_file(text: str) -> Path:
    """The `type` of an argparse option that names a file to write: said before hours of measuring."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"it is {text!r}, expected a file in a folder that is there")
    return path


def image_file(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"it is {text!r}, expected a file that ends in .png")
    return written_file(text)


def numbers(option: str, text: str, kind: type[Number], least: int) -> list[Number]:
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= number < math.inf for number in found):
        raise ValueError(f"{option} is {text!r}, expected numbers of at least {least} with commas between them")
    return found


def slots_per_layer(budget: float, num_experts: int) -> int:
    slots = num_experts * budget / 100
    if not 1 <= slots <= num_experts:
        raise ValueError(
            f"a budget of {budget:g} % of {num_experts} experts is {slots:g} slots, expected 1 to {num_experts}"
        )
    return int(slots)
