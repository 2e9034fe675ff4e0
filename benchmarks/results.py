"""`python -m benchmarks.results`: the tables of docs/results.md, photographs first, then the shipped emoji.

Where the photographs are not at hand (see `benchmarks.photos`) their table is one sentence that says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.demo import demo_model, demo_tasks
from taskres_hf.paper.reports import accuracy_table, summarise
from taskres_hf.paper.runner import run_benchmark, task_runs

from . import options as opt
from .photos import missing, photo_dataset, photo_model_path, photo_tasks


def photo_runs(task: str, shots: Sequence[int], seeds: Sequence[int], recipe: str = "auto") -> list[dict[str, Any]]:
    """Every draw of a task of photographs, as rows for `summarise`."""
    spec = photo_tasks()[task]
    model = TaskResCLIPForImageClassification.from_base(photo_model_path(), spec["classes"], spec["template"])
    return list(task_runs(model, photo_dataset(task), task, shots, seeds, recipe))


def print_photos(
    shots: Sequence[int] = (1, 2, 4, 8, 16), seeds: Sequence[int] = (1, 2, 3, 4, 5), recipe: str = "auto"
) -> None:
    """The table of the photographs as Markdown, or the sentence that says why there is none."""
    if reason := missing():
        print(f"Not measured: {reason}")
        return
    runs = [run for task in photo_tasks() for run in photo_runs(task, shots, seeds, recipe)]
    print(accuracy_table(summarise(runs), len(seeds), first="task").markdown(), flush=True)


def main() -> None:
    parser = opt.parser(__doc__)
    parser.add_argument("--recipe", choices=["auto", "auto-v1", "paper"], default="auto")
    options = opt.read(parser)
    for kind in opt.kinds(options):
        if kind == opt.PHOTOGRAPHS:
            print_photos(options.shots, options.seeds, options.recipe)
            continue
        runs = run_benchmark(
            demo_model(), list(demo_tasks()), shots=options.shots, seeds=options.seeds, recipes=[options.recipe],
            targets=[],
        )  # fmt: skip
        print(accuracy_table(summarise(runs), len(options.seeds), first="task").markdown())


if __name__ == "__main__":
    main()
