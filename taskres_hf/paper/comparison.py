"""What is reported of compared methods: `results.csv`, means, harm against zero-shot, cost, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from ..storage import write_bytes
from ..tables import Table, markdown_text
from .figures import write_figures

Result = Mapping[str, Any]
RESULTS = "results.csv"
REFERENCE = "taskres"  # what the others are compared with
_COLUMNS = ("method", "dataset", "shots", "seed", "accuracy", "ece", "trained_parameters", "fit_seconds")
_RESAMPLES = 9_999  # of the signs; all of them are tried where there are no more


def write_results(results: Iterable[Result], folder: Path) -> Path:
    """Write `results.csv` in one step: a row for each fit that has a result, shares from 0 to 1."""
    rows = [[result[column] for column in _COLUMNS] for result in finished(results)]
    write_bytes(folder / RESULTS, Table(_COLUMNS, rows).csv().encode("utf-8"))
    return folder / RESULTS


def finished(results: Iterable[Result]) -> list[Result]:
    """Those that have a result."""
    return [result for result in results if "error" not in result]


def failures(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Why methods have no result: `method`, `reason`, and how many fits (`count`), each reason once."""
    rows: dict[tuple[str, str], int] = {}
    for result in results:
        if "error" in result:
            key = (result["method"], result["error"])
            rows[key] = rows.get(key, 0) + 1
    return [{"method": method, "reason": reason, "count": count} for (method, reason), count in rows.items()]


def _values(results: Iterable[Result], key: str, *by: str) -> dict[tuple[Any, ...], list[Any]]:
    """Values of `key` grouped by further keys."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in by), []).append(result[key])
    return groups


def summarise_methods(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row a method, the most accurate first; those without all results last.

    Returns:
        `method`; `accuracy` {shots: percent, the mean over datasets and seeds} and `spread` {shots: standard deviation
        over seeds of the mean over datasets, in points; None for one seed}, both only where every dataset and seed has
        a result; `mean` over all shots, or None. `worst_harm`: `points`, the smallest difference to zero-shot of a
        dataset and a number of shots, each the mean over seeds, and its `dataset` and `shots`. `ece` in percent, the
        mean over everything. At the largest number of shots: `trained_parameters` (the most of any dataset),
        `fit_seconds` (median) and `peak_memory` (bytes, the most, or None). `linear`: whether it can be saved as a
        residual, with `not_linear` if not; `selected_on`.
    """
    counts = sorted({result["shots"] for result in results})
    places = {(result["dataset"], result["seed"]) for result in results}
    rows = []
    for (method,), own in _by_method(results).items():
        accuracy: dict[int, float] = {}
        spread: dict[int, float | None] = {}
        for count in counts:
            scores = {(one["dataset"], one["seed"]): 100 * one["accuracy"] for one in own if one["shots"] == count}
            if scores.keys() == places:
                by_seed = [
                    mean(v for (_, s), v in scores.items() if s == seed) for seed in sorted({s for _, s in places})
                ]
                accuracy[count], spread[count] = mean(by_seed), stdev(by_seed) if len(by_seed) > 1 else None
        whole = bool(accuracy) and len(accuracy) == len(counts)
        rows.append({
            "method": method, "accuracy": accuracy, "spread": spread,
            "mean": mean(accuracy.values()) if whole else None, **_cost(own),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row["mean"] is None, -(row["mean"] or 0.0)))


def _by_method(results: Iterable[Result]) -> dict[tuple[str], list[Result]]:
    """Each method's finished results; methods without one have none."""
    groups: dict[tuple[str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["method"],), []).extend(finished([result]))
    return groups


def _cost(own: Sequence[Result]) -> dict[str, Any]:
    """What besides its accuracy is said of a method with these results."""
    if not own:
        return dict.fromkeys((
            "worst_harm", "ece", "trained_parameters", "fit_seconds", "peak_memory", "linear", "not_linear",
            "selected_on",
        ))  # fmt: skip
    after, before = _values(own, "accuracy", "dataset", "shots"), _values(own, "zero_shot_accuracy", "dataset", "shots")
    harm = {key: 100 * (mean(after[key]) - mean(before[key])) for key in after}
    worst = min(harm, key=lambda key: harm[key])
    most = [result for result in own if result["shots"] == max(result["shots"] for result in own)]
    memory = [result["peak_memory"] for result in most if result["peak_memory"] is not None]
    return {
        "worst_harm": {"points": harm[worst], "dataset": worst[0], "shots": worst[1]},
        "ece": 100 * mean(result["ece"] for result in own),
        "trained_parameters": max(result["trained_parameters"] for result in most),
        "fit_seconds": median(result["fit_seconds"] for result in most),
        "peak_memory": max(memory) if memory else None, "linear": all(result["linear"] for result in own),
        "not_linear": next((result["not_linear"] for result in own if not result["linear"]), ""),
        "selected_on": next((result["selected_on"] for result in reversed(own) if result["selected_on"]), ""),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- significance


def paired_differences(results: Sequence[Result], reference: str = REFERENCE) -> list[dict[str, Any]]:
    """How much more accurate each method is than the reference, on the same draws and test pictures.

    A pair is a dataset and a seed; its difference is the mean over all shots. That the differences are as likely to
    have the other sign is tested by flipping signs: all ways where there are at most 9,999 of them, else that many at
    random. With n pairs no p is below 2 / 2^n.

    Returns:
        A row for each other method, the best first: `method`, `difference` in points, `by_shots` {shots: points},
        `pairs`, `better` and `worse` (pairs), `p` (two-sided) and `p_holm` (for all methods together, Holm 1979). Pairs
        without all results of both are left out; a method without any pair has no row. Empty without the reference.
    """
    counts = sorted({result["shots"] for result in results})
    scores: dict[str, dict[tuple[str, int], dict[int, float]]] = {}
    for result in finished(results):
        place = scores.setdefault(result["method"], {}).setdefault((result["dataset"], result["seed"]), {})
        place[result["shots"]] = 100 * result["accuracy"]
    ours = scores.pop(reference, {})
    rows: list[dict[str, Any]] = []
    for method, theirs in scores.items():
        places = [place for place in ours if place in theirs and len(ours[place]) == len(theirs[place]) == len(counts)]
        if not places:
            continue
        gaps = {place: {count: theirs[place][count] - ours[place][count] for count in counts} for place in places}
        pairs = [mean(gap.values()) for gap in gaps.values()]
        rows.append({
            "method": method, "difference": mean(pairs),
            "by_shots": {count: mean(gap[count] for gap in gaps.values()) for count in counts},
            "pairs": len(pairs), "better": sum(gap > 0 for gap in pairs), "worse": sum(gap < 0 for gap in pairs),
            "p": sign_flip_test(pairs),
        })  # fmt: skip
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = adjusted
    return sorted(rows, key=lambda row: -row["difference"])


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p of the mean of paired differences, by flipping their signs; see `paired_differences`."""
    from scipy.stats import permutation_test  # type: ignore[import-untyped]

    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not values.any():
        return 1.0
    flipped = permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=_RESAMPLES, vectorized=True, random_state=0
    )
    return float(flipped.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p values for all hypotheses together (Holm 1979), in the same order."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return adjusted


# ---------------------------------------------------------------------------------------------------- tables


def accuracy_table(rows: Sequence[Mapping[str, Any]], results: Sequence[Result], dataset: str | None = None) -> Table:
    """Mean accuracy at each number of shots, spread over seeds, and the worst harm; `dataset` is named in the title."""
    counts = sorted({count for row in rows for count in row["accuracy"]})
    seeds, tasks = len({one["seed"] for one in results}), len({one["dataset"] for one in results})
    cells = [
        [
            row["method"],
            *(_score(row, count) for count in counts),
            _signed(row["worst_harm"] and row["worst_harm"]["points"]),
        ]
        for row in rows
    ]
    title = f"{dataset}: accuracy" if dataset else "Accuracy"
    over = [f"{count} {name}" for count, name in ((tasks, "datasets"), (seeds, "seeds")) if count > 1]
    title += " in percent" + (f", mean over {' and '.join(over)}" if over else "")
    title += " ± standard deviation over seeds" if seeds > 1 else ""
    caption = "harm: the worst against zero-shot, the smallest difference in points of a dataset and a number of shots"
    shots = [f"{count} shot{'s' * (count > 1)}" for count in counts]
    return Table(["method", *shots, "harm"], cells, title, caption, bold=_reference_rows(rows))


def cost_table(rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> Table:
    """Calibration, trained parameters, time and memory, and whether the method can be saved as a residual."""
    cells = [
        [
            row["method"], _text(row["ece"], "{:.1f}".format), row["trained_parameters"],
            _text(row["fit_seconds"], "{:.3f}".format), _text(row["peak_memory"], lambda size: f"{size / 1e6:.1f}"),
            {True: "yes", False: "no", None: ""}[row["linear"]],
        ]
        for row in rows
    ]  # fmt: skip
    most = max((result["shots"] for result in results), default=0)
    caption = (
        "ECE: expected calibration error in percent, 15 bins, mean over everything. Parameters, seconds of fitting and "
        f"memory at its peak at {most} shots."
    )
    columns = ["method", "ECE", "parameters", "seconds", "MB", "saved as a residual"]
    return Table(columns, cells, caption=caption, bold=_reference_rows(rows))


def difference_table(pairs: Sequence[Mapping[str, Any]], reference: str = REFERENCE) -> Table:
    """Paired differences to the reference, with their significance."""
    cells = [
        [
            row["method"],
            _signed(row["difference"], 2),
            row["better"],
            row["worse"],
            f"{row['p']:.2g}",
            f"{row['p_holm']:.2g}",
        ]
        for row in pairs
    ]
    most = max((row["pairs"] for row in pairs), default=0)
    least = max(2 / 2**most, 1 / (_RESAMPLES + 1))
    caption = (
        f"Mean over all shots of accuracy minus that of {reference}, in points, over {most} pairs (dataset and seed) "
        f"on the same draws; p by flipping signs, no smaller than {least:.1g}; Holm: for all methods together."
    )
    return Table(["method", "difference", "better", "worse", "p", "p (Holm)"], cells, None, caption)


def _reference_rows(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    return [number for number, row in enumerate(rows) if row["method"] == REFERENCE]


def _score(row: Mapping[str, Any], count: int) -> str:
    if count not in row["accuracy"]:
        return ""
    spread = row["spread"][count]
    return f"{row['accuracy'][count]:.1f}" + ("" if spread is None else f" ± {spread:.1f}")


def _signed(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value + 0.0:+.{digits}f}"


def _text(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else form(value)


# ---------------------------------------------------------------------------------------------------- the report


def as_markdown(results: Sequence[Result], base_model: str, figures: Sequence[str] = ()) -> str:
    """Everything that is said of a comparison, as Markdown.

    Args:
        base_model: its name, as it is to be read. figures: names of files beside the report.
    """
    rows, pairs = summarise_methods(results), paired_differences(results)
    names = list(dict.fromkeys(result["dataset"] for result in results))
    parts = [
        "# Few-shot methods compared",
        "\n".join(f"- {markdown_text(line)}" for line in what_ran(results, base_model)),
    ]
    parts += [accuracy_table(rows, results).markdown(), cost_table(rows, results).markdown()]
    if pairs:
        parts.append(difference_table(pairs).markdown())
    if lines := failure_lines(results):
        parts.append("\n".join(f"- {markdown_text(line)}" for line in lines))
    parts += [f"![{name}]({name})" for name in figures]
    if len(names) > 1:
        for name in names:
            own = [result for result in results if result["dataset"] == name]
            parts.append(accuracy_table(summarise_methods(own), own, name).markdown())
    reasons = [
        f"- {markdown_text(row['method'])}: {markdown_text(row['not_linear'])}" for row in rows if row["not_linear"]
    ]
    if reasons:
        parts.append("Not saved as a residual:\n\n" + "\n".join(reasons))
    chosen = [
        f"- {markdown_text(row['method'])}: {markdown_text(row['selected_on'])}" for row in rows if row["selected_on"]
    ]
    if chosen:
        parts.append("What methods choose themselves is chosen on:\n\n" + "\n".join(chosen))
    return "\n\n".join(parts) + "\n"


def what_ran(results: Sequence[Result], base_model: str) -> list[str]:
    """The base model, the engine, and the notes on each dataset, a line each."""
    done = finished(results)
    engines = sorted({result["engine"] for result in done})
    lines = [f"Base model {base_model}" + (f", pictures embedded by {', '.join(engines)}" if engines else "")]
    seen: dict[str, int] = {}
    for result in done:
        seen[result["dataset"]] = max(seen.get(result["dataset"], 0), result["seen_in_training"])
        lines += [f"{result['dataset']}: {note}" for note in result["notes"]]
    lines += [f"{name}: up to {count} test pictures were drawn for training" for name, count in seen.items() if count]
    return list(dict.fromkeys(lines))


def failure_lines(results: Sequence[Result]) -> list[str]:
    """Each method without results, and why."""
    return [f"{row['method']} has no result in {row['count']} fits: {row['reason']}" for row in failures(results)]


def write_report(results: Sequence[Result], folder: Path, base_model: str) -> list[Path]:
    """Write `results.csv`, `report.md` and, with matplotlib, the figures as PNG and SVG.

    Returns:
        The files written.
    """
    figures = write_figures(summarise_methods(results), folder) if finished(results) else []
    pictures = [file.name for file in figures if file.suffix == ".png"]
    write_bytes(folder / "report.md", as_markdown(results, base_model, pictures).encode("utf-8"))
    return [write_results(results, folder), folder / "report.md", *figures]
