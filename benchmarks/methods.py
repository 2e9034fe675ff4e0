"""`python -m benchmarks.methods`: peers beside ours, on the photographs and on the shipped emoji.

Every method sees the same embeddings, draws and text, the template of the task; see `taskres compare` for one's own
data. Methods that take many seconds a fit are left out unless `--methods` names them.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

from taskres_hf.demo import demo_model, demo_tasks
from taskres_hf.paper.compare import compare_methods
from taskres_hf.paper.comparison import (
    accuracy_table,
    cost_table,
    difference_table,
    paired_differences,
    summarise_methods,
)

from .photos import missing, photo_model_path, photo_root, photo_tasks

QUICK = (
    "zero-shot", "class-mean", "linear-probe", "linear-probe-cv", "gda", "lp++", "clap", "tip-adapter", "ape", "proker",
    "taskres-auto-v1", "taskres",
)  # fmt: skip


def print_tables(results: list[dict[str, Any]]) -> None:
    """Accuracy, calibration and cost, and paired differences."""
    rows = summarise_methods(results)
    for table in (accuracy_table(rows, results), cost_table(rows, results)):
        print(table.markdown(), "\n", flush=True)
    print(difference_table(paired_differences(results)).markdown(), flush=True)


def photo_results(methods: Sequence[str], shots: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every fit on the photographs."""
    return [
        result
        for name, spec in photo_tasks().items()
        for result in compare_methods(
            photo_model_path(), {name: str(photo_root() / name)}, methods=methods, shots=shots, seeds=seeds,
            templates=spec["template"],
        )
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(QUICK))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, default=5, help="how many draws, 1 to this")
    parser.add_argument("--only", choices=["photos", "emoji"], help="one of the two")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    seeds = range(1, options.seeds + 1)
    if options.only != "emoji":
        print("## Photographs\n")
        reason = missing()
        print(f"Not measured: {reason}") if reason else print_tables(
            photo_results(options.methods, options.shots, seeds)
        )
    if options.only != "photos":
        print("\n## Shipped emoji\n")
        runs = compare_methods(
            demo_model(), list(demo_tasks()), methods=options.methods, shots=options.shots, seeds=seeds
        )
        print_tables(runs)


if __name__ == "__main__":
    main()
