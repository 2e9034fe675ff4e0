"""What the commands that measure accuracy have in common: options, two kinds of tasks, quiet libraries."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator

from .photos import missing

PHOTOGRAPHS, EMOJI = "photographs", "emoji"


def parser(
    description: str | None, seeds: int = 5, shots: tuple[int, ...] = (1, 2, 4, 8, 16)
) -> argparse.ArgumentParser:
    """A parser with `--shots`, `--seeds` and `--only`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shots", type=int, nargs="+", default=list(shots))
    made.add_argument("--seeds", type=int, default=seeds, help=f"how many draws, 1 to this (default {seeds})")
    made.add_argument("--only", choices=["photos", "emoji"], help="one of the two kinds of tasks")
    return made


def read(made: argparse.ArgumentParser) -> argparse.Namespace:
    """What was asked for, with the seeds as a list; from here on libraries show no progress and no warnings."""
    import datasets
    import transformers

    options = made.parse_args()
    options.seeds = list(range(1, options.seeds + 1))
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return options


def kinds(options: argparse.Namespace, swap: bool = False) -> Iterator[str]:
    """The kinds asked for, a heading printed before each; photographs that are not at hand are a sentence instead.

    Args:
        swap: each kind is seen by the base model of the other one.
    """
    for kind, heading, other in ((PHOTOGRAPHS, "Photographs", "emoji"), (EMOJI, "Shipped emoji", "photos")):
        if options.only == other:
            continue
        by = f" by the base model of the {EMOJI if kind == PHOTOGRAPHS else PHOTOGRAPHS}" if swap else ""
        print(f"## {heading}{by}\n")
        reason = missing() if swap or kind == PHOTOGRAPHS else None
        if reason:
            print(f"Not measured: {reason}\n")
        else:
            yield kind
