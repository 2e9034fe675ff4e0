"""`python -m benchmarks.methods`: peers beside ours, on the photographs and on the shipped emoji.

Every method sees the same embeddings, draws and text, the template of the task; see `taskres compare` for one's own
data. Methods that take many seconds a fit are left out unless `--methods` names them, or `--slow` asks for them:

    python -m benchmarks.methods --slow --output-dir FOLDER     # finished fits are kept there and not made again
    python -m benchmarks.methods --seconds                      # what one fit of each takes
    python -m benchmarks.methods --swap                         # each kind of tasks by the base model of the other

The constants of recipe `auto` were chosen on the tasks as they are, not on those of `--swap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from taskres_hf.demo import demo_model, demo_tasks
from taskres_hf.paper.compare import compare_methods
from taskres_hf.paper.comparison import (
    accuracy_table,
    cost_table,
    difference_table,
    failure_lines,
    paired_differences,
    summarise_methods,
)
from taskres_hf.tables import Table

from . import options as opt
from .photos import photo_model_path, photo_root, photo_tasks

QUICK = (
    "zero-shot", "class-mean", "linear-probe", "linear-probe-cv", "gda", "lp++", "clap", "tip-adapter", "ape", "proker",
    "taskres-auto-v1", "taskres",
)  # fmt: skip
SLOW = ("taskres", "taskres-paper", "tip-adapter-f", "ape-t", "clip-adapter", "prolip", "cross-modal")
PROMPTS = ("coop", "coop-4")  # through the text tower at every step: one task
SLOWEST = "clip-lora"  # through both towers at every step: one task, one draw
ONE_TASK = {opt.PHOTOGRAPHS: "coins", opt.EMOJI: "people"}


def run(
    kind: str,
    methods: Sequence[str],
    shots: Sequence[int],
    seeds: Sequence[int],
    folder: Path | None = None,
    only: str | None = None,
    swap: bool = False,
) -> list[dict[str, Any]]:
    """Every fit on all tasks of a kind, or on the one that `only` names; with a folder, finished ones are kept.

    With `swap`, by the base model of the other kind.
    """
    place = None if folder is None else folder / (f"{kind}-swapped" if swap else kind)
    base = demo_model() if (kind == opt.EMOJI) != swap else photo_model_path()
    if kind == opt.EMOJI:
        names = [name for name in demo_tasks() if only in (None, name)]
        return compare_methods(base, names, place, methods=methods, shots=shots, seeds=seeds)
    return [
        result
        for name, spec in photo_tasks().items()
        if only in (None, name)
        for result in compare_methods(
            base, {name: str(photo_root() / name)}, place, methods=methods, shots=shots, seeds=seeds,
            templates=spec["template"],
        )
    ]  # fmt: skip


def print_tables(results: list[dict[str, Any]]) -> None:
    """Accuracy, calibration and cost, and paired differences."""
    rows = summarise_methods(results)
    for table in (accuracy_table(rows, results), cost_table(rows, results)):
        print(table.markdown(), "\n", flush=True)
    print(difference_table(paired_differences(results)).markdown(), "\n", flush=True)
    print("\n".join(failure_lines(results)))


def print_slow(kind: str, seeds: Sequence[int], folder: Path | None) -> None:
    """The methods that train for long, at 1, 4 and 16 shots; on one task, those that go through a tower each step."""
    print_tables(run(kind, SLOW, (1, 4, 16), seeds, folder))
    task = ONE_TASK[kind]
    for methods, shots, draws in ((PROMPTS, (1, 4), seeds), ((SLOWEST,), (1,), seeds[:1])):
        results = run(kind, ["taskres", *methods], shots, draws, folder, task)
        for table in (accuracy_table(summarise_methods(results), results, task), _seconds(results)):
            print(table.markdown(), "\n", flush=True)
        print("\n".join(failure_lines(results)))


def _seconds(results: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds of one fit of each method, the mean over seeds."""
    taken: dict[tuple[str, int], list[float]] = {}
    for one in results:
        if "error" not in one:
            taken.setdefault((one["method"], one["shots"]), []).append(one["fit_seconds"])
    rows = [[method, shots, f"{mean(seconds):.2f}"] for (method, shots), seconds in taken.items()]
    return Table(["method", "shots", "seconds of a fit"], rows)


def print_seconds(kind: str) -> None:
    """Seconds of one fit of each method that takes long, at 4 shots on one task."""
    task = ONE_TASK[kind]
    results = run(kind, [*SLOW, *PROMPTS, SLOWEST], [4], [1], None, task)
    print(f"{task}\n\n{_seconds(results).markdown()}\n", flush=True)


def main() -> None:
    parser = opt.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(QUICK))
    parser.add_argument("--slow", action="store_true", help="the methods that take many seconds a fit; 2 seeds")
    parser.add_argument("--seconds", action="store_true", help="only time one fit of each of those")
    parser.add_argument("--output-dir", type=Path, help="keep finished fits here, and take them again")
    parser.add_argument("--swap", action="store_true", help="each kind of tasks by the base model of the other")
    options = opt.read(parser)
    if options.swap and (options.slow or options.seconds):
        parser.error("--swap goes with neither --slow nor --seconds")
    for kind in opt.kinds(options, options.swap):
        if options.seconds:
            print_seconds(kind)
        elif options.slow:
            print_slow(kind, options.seeds[:2], options.output_dir)
        else:
            folder, swap = options.output_dir, options.swap
            print_tables(run(kind, options.methods, options.shots, options.seeds, folder, swap=swap))


if __name__ == "__main__":
    main()
