"""`python -m benchmarks.difficulty`: how well measures made before training predict what training reaches.

Recipe `auto` is trained on the photographs and the shipped emoji, each by its own base model and by that of the other
kind, and on random subsets of each task's classes. A measure is made without labels from the training pictures, or with
labels from the shots; what it is to predict is the accuracy on the test split, or its gain over zero-shot.

Lines are fitted and chosen on other tasks than those they predict: each task left out in turn, with its subsets and
under both base models, or all tasks of a kind, or one base model. All intervals are bootstrapped over the 13 tasks.

    python -m benchmarks.difficulty --output-dir FOLDER          # finished tasks are kept there and not made again
    python -m benchmarks.difficulty --output-dir FOLDER --fit    # also write the constants that the library uses
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from taskres_hf.analysis import difficulty as measures
from taskres_hf.analysis import transfer
from taskres_hf.tables import Table

from . import options as opt
from .difficulty_records import Array, Record, Row, all_records, class_rows, task_rows
from .photos import missing

LEVELS = (0.5, 0.8, 0.9)
BOOTSTRAPS = 500
DECAY = 0.3  # of ridge regression, in units of each term's variance
MODES = (transfer.UNLABELLED, transfer.ONE, transfer.SEVERAL)
TARGETS = ("accuracy", "gain")

# ---------------------------------------------------------------------- lines, each on other tasks than it predicts


def line_terms(names: Sequence[str], mode: str) -> list[str]:
    """Each value, alone and times the log of the shots; with several labels also times the log of those given."""
    factors = ["log_shots"] + (["log_given"] if mode == transfer.SEVERAL and names else [])
    return [*factors, *names, *(f"{name}*{factor}" for factor in factors for name in names)]


class Design(NamedTuple):
    """Terms of all rows [R, P + 1], and what ridge regression needs of each atom."""

    x: Array
    gram: Array
    to: Array


class Fitting:
    """Ridge regression with each task of equal weight, by sums over atoms (a task under a base model).

    Args:
        rows: what to fit on. target: `accuracy` or `gain`. odds: fit the accuracy's log-odds.
    """

    def __init__(self, rows: Sequence[Row], target: str, odds: bool) -> None:
        self.rows, self.odds = rows, odds
        names = sorted({(row.task, row.kind, row.base) for row in rows})
        self.atom = np.array([names.index((row.task, row.kind, row.base)) for row in rows])
        self.groups = {
            of: np.array([name[place] for name in names]) for place, of in enumerate(("task", "kind", "base"))
        }
        self.every = np.ones(len(names), dtype=bool)
        self.tasks = self.groups["task"][self.atom]
        counts = Counter(self.tasks.tolist())
        self.weights = np.array([1.0 / counts[task] for task in self.tasks.tolist()])
        self.cell = np.array([transfer.cell_of(row.values, row.shots) for row in rows])
        self.reached = np.array([getattr(row, target) for row in rows])
        self.target = np.array([transfer.log_odds(value) for value in self.reached]) if odds else self.reached

    def design(self, terms: Sequence[str]) -> Design:
        columns = {name: np.array([row.values[name] for row in self.rows]) for t in terms for name in t.split("*")}
        products = [np.prod([columns[name] for name in term.split("*")], axis=0) for term in terms]
        x = np.stack([np.ones(len(self.rows)), *products], axis=1)
        parts = [self.atom == number for number in range(len(self.every))]
        gram = np.stack([(x[part] * self.weights[part, None]).T @ x[part] for part in parts])
        to = np.stack([(x[part] * self.weights[part, None]).T @ self.target[part] for part in parts])
        return Design(x, gram, to)

    def solve(self, design: Design, keep: NDArray[np.bool_]) -> Array:
        """Intercept and weights from some atoms; the penalty is on weights in units of each term's spread."""
        gram, to = design.gram[keep].sum(0), design.to[keep].sum(0)
        gram, to = gram / gram[0, 0], to / gram[0, 0]
        spread = np.maximum(np.diag(gram) - gram[0] ** 2, 1e-9)
        spread[0] = 0.0
        return np.asarray(np.linalg.solve(gram + DECAY * np.diag(spread), to))

    def left_out(self, design: Design, group: str, among: NDArray[np.bool_] | None = None) -> Array:
        """The line's values on each group by the others; NaN where not among."""
        among, of = self.every if among is None else among, self.groups[group]
        told = np.full(len(self.rows), np.nan)
        for value in np.unique(of[among]):
            out = among & (of == value)
            rows = out[self.atom]
            told[rows] = design.x[rows] @ self.solve(design, among & ~out)
        return told

    def share(self, told: Array) -> Array:
        return np.asarray(1.0 / (1.0 + np.exp(-told)) if self.odds else told)

    def error(self, told: Array, among: NDArray[np.bool_]) -> float:
        """Mean absolute error, each task of equal weight, in points."""
        rows = among[self.atom]
        wrong = np.abs(self.share(told[rows]) - self.reached[rows])
        return 100.0 * float(np.average(wrong, weights=self.weights[rows]))

    def half_widths(self, told: Array, among: NDArray[np.bool_], level: float) -> dict[str, float]:
        """Half widths by pictures given and shots, from lines that left each task out."""
        off, rows = np.abs(told - self.target), among[self.atom]
        parts = {str(cell): rows & (self.cell == cell) for cell in np.unique(self.cell)}
        return {cell: _quantile(off[part], self.weights[part], level) for cell, part in parts.items()}

    def covered(self, design: Design, group: str) -> dict[float, Array]:
        """Level to whether intervals hold what was reached; line and widths both of other groups."""
        held = {level: np.zeros(len(self.rows)) for level in LEVELS}
        of = self.groups[group]
        for value in np.unique(of):
            keep = of != value
            inner = self.left_out(design, "task", keep)
            rows = ~keep[self.atom]
            told, reached = design.x[rows] @ self.solve(design, keep), self.reached[rows]
            for level in LEVELS:
                widths = self.half_widths(inner, keep, level)
                half = np.array([widths[cell] for cell in self.cell[rows].tolist()])
                low, high = self.share(told - half), self.share(told + half)
                held[level][rows] = (low - 1e-12 <= reached) & (reached <= high + 1e-12)
        return held


def _quantile(values: Array, weights: Array, share: float) -> float:
    order = np.argsort(values)
    passed = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(int(np.searchsorted(passed, share)), len(values) - 1)])


# ---------------------------------------------------------------------- candidates

_K = "log_classes"
_U, _L, _O = list(measures.UNLABELLED), list(measures.LABELLED), list(measures.LEFT_OUT)
_FREE = [name for name in _U if name != "prompt_agreement"]  # of one prompt a class
_SETS: dict[str, dict[str, list[str]]] = {
    transfer.UNLABELLED: {
        "sure and of all classes": ["information", "margin", _K],
        "the same, prompts agree": ["information", "margin", "prompt_agreement", _K],
        "all of one prompt": [*_FREE, _K],
        "all": [*_U, _K],
    },
    transfer.ONE: {
        "zero-shot and classes": ["zero_shot_accuracy", _K],
        "as recipe auto sees it": ["text_information", "mean_separation", _K],
        "zero-shot, LEEP, NCE": ["zero_shot_accuracy", "leep", "nce", _K],
        "zero-shot, sure and of all classes": ["zero_shot_accuracy", "information", "margin", _K],
        "the same and LEEP, NCE": ["zero_shot_accuracy", "leep", "nce", "information", "margin", _K],
        "all with labels": [*_L, _K],
        "all": [*_FREE, *_L, _K],
    },
    transfer.SEVERAL: {
        "zero-shot and classes": ["zero_shot_accuracy", _K],
        "as recipe auto sees it": ["text_information", "means_information", _K],
        "cross-validated, zero-shot": ["cross_validated", "zero_shot_accuracy", _K],
        "the same, text and means": [
            "cross_validated", "zero_shot_accuracy", "class_means", "text_information", "means_information", _K,
        ],
        "the same, sure and of all classes": [
            "cross_validated", "zero_shot_accuracy", "class_means", "text_information", "means_information",
            "information", "margin", _K,
        ],
        "all with labels": [*_L, *_O, _K],
        "all": [*_FREE, *_L, *_O, _K],
    },
}  # fmt: skip
_CLASS_SETS = {
    transfer.UNLABELLED: {
        "mean only": [],
        "all": ["sureness", "claimed_share", "text_separation", "alignment"],
    },
    transfer.ONE: {
        "mean only": [],
        "zero-shot": ["recall", "truth_probability"],
        "all": ["sureness", "claimed_share", "text_separation", "truth_probability", "recall", "mean_separation"],
    },
    transfer.SEVERAL: {
        "mean only": [],
        "zero-shot": ["recall", "truth_probability"],
        "left out": ["left_out_probability", "left_out_recall", "class_means"],
        "all": ["truth_probability", "recall", "mean_separation", "left_out_probability", "left_out_recall",
                "class_means"],
    },
}  # fmt: skip


def candidates(mode: str) -> dict[str, list[str]]:
    """Name to values: nothing, each measure alone, and sets of them."""
    alone = [*_U, *(_L if mode != transfer.UNLABELLED else []), *(_O if mode == transfer.SEVERAL else [])]
    rtd = {} if mode == transfer.UNLABELLED else {"rtd": ["rtd"]}
    return {"mean of other tasks": [], _K: [_K], **rtd, **{name: [name] for name in alone}, **_SETS[mode]}


def class_candidates(mode: str) -> dict[str, list[str]]:
    """The same of classes; with each measure goes its mean over the classes of the task."""
    sets = _CLASS_SETS[mode]
    alone = {name: [name] for name in dict.fromkeys(name for names in sets.values() for name in names)}
    return {
        title: [_K, *names, *(f"mean_{name}" for name in names)] if names else []
        for title, names in {**alone, **sets}.items()
    }


def choose(fitting: Fitting, designs: Mapping[str, Design], among: NDArray[np.bool_]) -> str:
    """The candidate of least error where each task is left out of those that are among."""
    errors = {name: fitting.error(fitting.left_out(one, "task", among), among) for name, one in designs.items()}
    return min(errors, key=lambda name: errors[name])


# ---------------------------------------------------------------------- tables


def _bootstrapped(tasks_of: NDArray[Any], value: Callable[[NDArray[np.int64]], float]) -> tuple[float, float, float]:
    """A value of all rows and its 95 % interval over draws of tasks."""
    generator, names = np.random.default_rng(0), np.unique(tasks_of)
    places = {name: np.flatnonzero(tasks_of == name) for name in names}
    drawn = [
        value(np.concatenate([places[name] for name in generator.choice(names, len(names))]))
        for _ in range(BOOTSTRAPS)
    ]  # fmt: skip
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return value(np.arange(len(tasks_of))), float(low), float(high)


def _spearman(one: Array, other: Array) -> float:
    if len(one) < 3 or one.std() == 0 or other.std() == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(one), rankdata(other))[0, 1])


def _cell(found: tuple[float, float, float], form: str = ".2f") -> str:
    return f"{found[0]:{form}} ({found[1]:{form}}, {found[2]:{form}})"


def rank_table(found: Sequence[Record], shots: Sequence[int]) -> Table:
    """Rank correlation of each measure with what was reached, over tasks, subsets, base models and draws."""
    rows = []
    for name in [*_U, *_L, *_O, "rtd", _K]:
        mode = transfer.UNLABELLED if name in (*_U, _K) else transfer.SEVERAL
        cells: list[str] = []
        for target in TARGETS:
            for count in shots:
                here = [row for row in task_rows(found, transfer.ONE if count == 1 and mode != MODES[0] else mode)
                        if row.shots == count and name in row.values
                        and (mode == MODES[0] or row.values["log_given"] == np.log2(count))]  # fmt: skip
                if not here:
                    cells.append("")
                    continue
                measure = np.array([row.values[name] for row in here])
                reached = np.array([getattr(row, target) for row in here])
                cells.append(_cell(_bootstrapped(
                    np.array([row.task for row in here]),
                    lambda chosen, m=measure, r=reached: _spearman(m[chosen], r[chosen]),
                )))  # fmt: skip
        rows.append([name, *cells])
    columns = ["measure", *(f"{target}, {count} shots" for target in TARGETS for count in shots)]
    return Table(columns, rows, "Spearman's rank correlation with what was reached (95 % over tasks)")


def _mean_cell(values: Array, weights: Array, tasks_of: NDArray[Any], form: str) -> str:
    """The mean over tasks, each the weighted mean of its values, with its interval."""
    names = np.unique(tasks_of)
    means = np.array([np.average(values[tasks_of == name], weights=weights[tasks_of == name]) for name in names])
    return _cell(_bootstrapped(names, lambda chosen: float(means[chosen].mean())), form)


def prediction_table(
    rows: Sequence[Row], mode: str, target: str, odds: bool, sets: Mapping[str, list[str]], title: str
) -> Table:
    """Error of every candidate on what it was not fitted on, and of the one chosen anew each time."""
    fitting = Fitting(rows, target, odds)
    designs = {name: fitting.design(line_terms(names, mode)) for name, names in sets.items()}
    lines: list[list[Any]] = []

    def add(name: str, told: Mapping[str, Array]) -> None:
        off = {group: 100.0 * np.abs(fitting.share(values) - fitting.reached) for group, values in told.items()}
        lines.append([
            name, _mean_cell(off["task"], fitting.weights, fitting.tasks, ".1f"),
            *(_mean_cell(off[group], fitting.weights, fitting.tasks, ".1f") for group in ("kind", "base")),
            f"{_spearman(told['task'], fitting.reached):.2f}",
        ])  # fmt: skip

    for name, design in designs.items():
        add(name, {group: fitting.left_out(design, group) for group in fitting.groups})
    chosen = {group: np.zeros(len(rows)) for group in fitting.groups}
    for group, of in fitting.groups.items():
        for value in np.unique(of):
            best = designs[choose(fitting, designs, of != value)]
            out = (of == value)[fitting.atom]
            chosen[group][out] = best.x[out] @ fitting.solve(best, of != value)
    add("chosen on the other tasks", chosen)
    return Table(["from", "error, task left out", "kind left out", "base left out", "rank"], lines, title)


def given_table(rows: Sequence[Row], target: str) -> Table:
    """Error of the library's line by labelled pictures given, and by the shots that it speaks of."""
    fitting = Fitting(rows, target, target == "accuracy")
    names = candidates(transfer.SEVERAL)[LIBRARY[transfer.SEVERAL]]
    told = fitting.share(fitting.left_out(fitting.design(line_terms(names, transfer.SEVERAL)), "task"))
    off, shots = 100.0 * np.abs(told - fitting.reached), sorted({row.shots for row in rows})
    given = np.array([round(2 ** row.values["log_given"]) for row in rows])
    asked = np.array([row.shots for row in rows])
    lines = []
    for one in sorted(set(given.tolist())):
        parts = [(given == one) & (asked == other) for other in shots]
        lines.append([one, *(float(np.average(off[part], weights=fitting.weights[part])) for part in parts)])
    columns = ["given", *(f"at {count}" for count in shots)]
    return Table(columns, lines, f"{target} from several pictures a class: error in points, task left out")


def within_table(found: Sequence[Record], mode: str) -> Table:
    """Rank correlation over the classes of a task, the mean over tasks, base models and draws."""
    rows = class_rows(found, mode)
    size = {row.task: round(2 ** row.values[_K]) for row in rows}
    names = [name for name in class_candidates(mode) if name in rows[0].values]
    lines = []
    for name in names:
        cells = []
        for target in TARGETS:
            values: list[float] = []
            owners: list[str] = []
            start = 0
            while start < len(rows):  # the classes of a task stand together
                part = rows[start : start + size[rows[start].task]]
                start += len(part)
                rank = _spearman(np.array([r.values[name] for r in part]), np.array([getattr(r, target) for r in part]))
                if not np.isnan(rank):
                    values.append(rank)
                    owners.append(part[0].task)
            cells.append(_mean_cell(np.array(values), np.ones(len(values)), np.array(owners), ".2f"))
        lines.append([name, *cells])
    return Table(["measure of a class", *TARGETS], lines, f"Rank correlation within a task, {mode}")


# ---------------------------------------------------------------------- what the library uses

LIBRARY = {  # few and free of the encoder's size; nearly as good as all, see docs/difficulty.md
    transfer.UNLABELLED: "sure and of all classes",
    transfer.ONE: "zero-shot, LEEP, NCE",
    transfer.SEVERAL: "the same, sure and of all classes",
}
CLASS_LIBRARY = "all"


def fitted(rows: Sequence[Row], mode: str, target: str, odds: bool, names: Sequence[str]) -> dict[str, Any]:
    """The line of all tasks with its widths and measured coverage, as `transfer.Line` reads it."""
    fitting, terms = Fitting(rows, target, odds), line_terms(names, mode)
    design = fitting.design(terms)
    weights, told = fitting.solve(design, fitting.every), fitting.left_out(design, "task")
    used = sorted({name for term in terms for name in term.split("*")} - {"log_shots"})
    values = {name: np.array([row.values[name] for row in rows]) for name in used}
    held = {
        group: {f"{level:g}": _short(np.average(one, weights=fitting.weights)) for level, one in found.items()}
        for group in fitting.groups
        for found in [fitting.covered(design, group)]
    }
    return {
        "terms": terms, "weights": [_short(value) for value in weights[1:]], "intercept": _short(weights[0]),
        "seen": {name: [_short(v.min()), _short(v.max())] for name, v in values.items()},
        "spread": {name: _short(v.std()) for name, v in values.items()},
        "halves": {
            f"{level:g}": {cell: _short(width) for cell, width in widths.items()}
            for level in LEVELS
            for widths in [fitting.half_widths(told, fitting.every, level)]
        },
        "coverage": held,
    }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def constants(found: Sequence[Record], options: argparse.Namespace) -> dict[str, Any]:
    """What lies in `taskres_hf/analysis/difficulty.json`."""
    lines: dict[str, Any] = {}
    for mode in MODES:
        names = candidates(mode)[LIBRARY[mode]]
        rows = task_rows(found, mode)
        lines[mode] = {target: fitted(rows, mode, target, target == "accuracy", names) for target in TARGETS}
        of_classes = class_candidates(mode)[CLASS_LIBRARY]
        lines[mode]["class_accuracy"] = fitted(class_rows(found, mode), mode, "accuracy", False, of_classes)
    return {
        "made_by": "python -m benchmarks.difficulty --fit",
        "of": {
            "tasks": sorted({f"{record['kind']}: {record['task']}" for record in found}),
            "base_models": sorted({record["base"] for record in found}), "shots": options.shots,
            "seeds": options.seeds, "subsets": options.subsets,
        },
        "lines": lines,
    }  # fmt: skip


def coverage_table(made: Mapping[str, Any]) -> Table:
    """How often intervals hold what was reached."""
    rows = [
        [mode, target, f"{100 * float(level):.0f} %",
         *(f"{100 * held[level]:.0f} %" for held in line["coverage"].values())]
        for mode, lines in made["lines"].items() for target, line in lines.items() for level in line["halves"]
    ]  # fmt: skip
    columns = ["from", "of", "meant", "held, task left out", "kind left out", "base left out"]
    return Table(columns, rows, "How often intervals held what was reached")


def main() -> None:
    parser = opt.parser(__doc__)
    parser.add_argument("--subsets", type=int, default=4, help="random subsets of the classes of each task")
    parser.add_argument("--output-dir", type=Path, help="keep finished tasks here, and take them again")
    parser.add_argument("--fit", action="store_true", help="write the constants that the library uses")
    options = opt.read(parser)
    if options.only:
        parser.error("--only: kinds are left out in turn, so both are needed")
    if reason := missing():
        raise SystemExit(f"Not measured: {reason}")
    torch.set_num_threads(1)
    found = all_records(options)
    counts = [count for count in (1, 4, 16) if count in options.shots]
    print(rank_table(found, counts).markdown(), "\n", flush=True)
    for mode in MODES:
        rows = task_rows(found, mode)
        for target in TARGETS:
            title = f"{target} on the test split from {mode}: mean absolute error in points"
            table = prediction_table(rows, mode, target, target == "accuracy", candidates(mode), title)
            print(table.markdown(), "\n", flush=True)
            if mode == transfer.SEVERAL:
                print(given_table(rows, target).markdown(), "\n", flush=True)
    for mode in MODES:
        rows = class_rows(found, mode)
        print(within_table(found, mode).markdown(), "\n", flush=True)
        for target in TARGETS:
            title = f"{target} of a class from {mode}: mean absolute error in points"
            table = prediction_table(rows, mode, target, False, class_candidates(mode), title)
            print(table.markdown(), "\n", flush=True)
    made = constants(found, options)
    print(coverage_table(made).markdown(), "\n")
    if options.fit:
        transfer.CONSTANTS.write_text(json.dumps(made, indent=1) + "\n")
        print(f"Wrote {transfer.CONSTANTS.name}.")


if __name__ == "__main__":
    main()
