"""`python -m fuzz [TARGET ...] [--runs N] [--seed S] [--seconds T]`: damaged files of every kind, and what comes of it.

    python -m fuzz                       2,000 inputs of each kind, after the reproducers in fuzz/corpus
    python -m fuzz --all                 100,000 artifacts and 20,000 of each other kind, as `make fuzz`
    python -m fuzz kills --runs 200      processes killed at random moments
    python -m fuzz full                  a disk that is full at every write; the order of writes
    python -m fuzz small_disk            the same on a small tmpfs, and under a limit on the size of files
    python -m fuzz races                 eight processes and eight threads over one cache, one folder, one model
    python -m fuzz soak                  50,000 predictions, and 10,000 pictures of which 1 % are broken

Exit code 1 where there is a finding. One thread of torch is used.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from .harness import CORPUS, Outcome, print_table, replay, run_target
from .sources import BROUGHT
from .targets import OWN

TARGETS = {**OWN, **BROUGHT}
_LONG = {"artifact": 100_000}
_PROOFS = ("kills", "full", "small_disk", "races", "soak")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("target", nargs="*", choices=[*TARGETS, *_PROOFS, []], help="default: every kind of file")
    parser.add_argument("--runs", type=int, help="inputs of each kind, or kills")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; with it all of them can be made again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most so long for each kind")
    parser.add_argument("--all", action="store_true", help="the long run")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder of reproducers, read first and added to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    for name in options.target or TARGETS:
        if name in _PROOFS:
            outcomes += _prove(name, options)
            continue
        runs = options.runs or (_LONG.get(name, 20_000) if options.all else 2_000)
        target = TARGETS[name]()
        again = replay(target, options.corpus)
        outcomes += [again] if again.inputs else []
        outcomes.append(run_target(target, runs, options.seed, options.seconds, options.corpus))
    print_table(outcomes)
    return int(any(outcome.findings for outcome in outcomes))


def _prove(name: str, options: argparse.Namespace) -> list[Outcome]:
    from importlib import import_module

    return list(import_module(f".{name}", __package__).prove(options.runs, options.seed))


if __name__ == "__main__":
    sys.exit(main())
