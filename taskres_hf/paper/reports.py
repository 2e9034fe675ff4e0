"""What is reported of benchmark results: means and spread over seeds, as a table, CSV, Markdown and a figure.

`paper/published.json` holds published accuracies with their sources and how certain they are; they are shown
beside ours only where backbone and dataset are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..storage import write_bytes
from ..tables import Table
from .datasets import suite_datasets

_BACKBONES = {
    "clip-vit-base-patch16": "ViT-B/16",
    "clip-vit-base-patch32": "ViT-B/32",
    "clip-vit-large-patch14": "ViT-L/14",
}


def published_results() -> list[dict[str, Any]]:
    """Published accuracies in percent: method, backbone, dataset, accuracy by shots, source, certainty.

    certainty says where a number was read: in a `file`, in the image of a `table`, or off a `figure`.
    """
    rows: list[dict[str, Any]] = _published()["rows"]
    return rows


def published_configs() -> list[dict[str, Any]]:
    """Learning rate and epochs of the published code's configuration files, by backbone."""
    rows: list[dict[str, Any]] = _published()["configs"]
    return rows


def _published() -> dict[str, Any]:
    text = resources.files("taskres_hf").joinpath("paper/published.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def comparable_results(base_model: str, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Published rows for the same backbone and datasets, to print beside ours; none for other backbones."""
    backbone = _BACKBONES.get(base_model.rstrip("/").split("/")[-1])
    names = {result["dataset"] for result in results}
    eleven = {name for name, spec in suite_datasets().items() if "template_set" in spec}
    return [
        row
        for row in published_results()
        if row["backbone"] == backbone
        and (row["dataset"] in names or (row["dataset"] == "mean of 11" and names >= eleven))
    ]


def summarise(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds in percent per dataset, recipe and shots; the mean over datasets as `mean`.

    Returns:
        Rows with `dataset`, `recipe`, `zero_shot`, `accuracy` {shots: percent} and `spread` {shots: standard deviation
        over seeds in points, None for one seed}; targets as `dataset -> target`. The spread of `mean` is that of the
        seeds' means over datasets.
    """
    runs: dict[tuple[str, str], dict[int, dict[int, float]]] = {}  # accuracy by shots and seed
    zeros: dict[tuple[str, str], list[float]] = {}
    for result in results:
        measured = {result["dataset"]: result}
        measured |= {f"{result['dataset']} -> {name}": pair for name, pair in result["targets"].items()}
        for name, pair in measured.items():
            key = (name, result["recipe"])
            zeros.setdefault(key, []).append(100 * pair["zero_shot_accuracy"])
            runs.setdefault(key, {}).setdefault(result["shots"], {})[result["seed"]] = 100 * pair["accuracy"]
    zero_shot = {key: mean(values) for key, values in zeros.items()}
    rows = [_row(*key, zero_shot[key], by_shots) for key, by_shots in runs.items()]
    for recipe in dict.fromkeys(recipe for _, recipe in runs):
        same = [by_shots for (name, other), by_shots in runs.items() if other == recipe and " -> " not in name]
        if len(same) < 2:
            continue
        means: dict[int, dict[int, float]] = {}
        for count in sorted(set.intersection(*map(set, same))):
            seeds = sorted(set.intersection(*(set(by_shots[count]) for by_shots in same)))
            means[count] = {seed: mean(by_shots[count][seed] for by_shots in same) for seed in seeds}
        before = mean(zero_shot[name, other] for name, other in runs if other == recipe and " -> " not in name)
        rows.append(_row("mean", recipe, before, {count: by_seed for count, by_seed in means.items() if by_seed}))
    return rows


def _row(name: str, recipe: str, zero_shot: float, by_shots: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    values = {count: list(by_seed.values()) for count, by_seed in sorted(by_shots.items())}
    return {
        "dataset": name, "recipe": recipe, "zero_shot": zero_shot,
        "accuracy": {count: mean(scores) for count, scores in values.items()},
        "spread": {count: stdev(scores) if len(scores) > 1 else None for count, scores in values.items()},
    }  # fmt: skip


def accuracy_table(
    rows: Sequence[Mapping[str, Any]],
    seeds: int,
    *,
    first: str = "dataset",
    on: str = "the test split",
    caption: str | None = None,
) -> Table:
    """The rows of `summarise` as a table: mean and standard deviation over seeds; one recipe is named in the title."""
    counts = sorted({count for row in rows for count in row["accuracy"]})
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    cells = []
    for row in rows:
        scores = [_score(row["accuracy"].get(count), row["spread"].get(count)) for count in counts]
        cells.append([row["dataset"], *([row["recipe"]] if len(recipes) > 1 else []), row["zero_shot"], *scores])
    title = f"Accuracy on {on} in percent"
    title += f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    title += f", recipe {recipes[0]}" if len(recipes) == 1 else ""
    columns = [first, *(["recipe"] if len(recipes) > 1 else []), "zero-shot"]
    columns += [f"{count} shot{'s' * (count > 1)}" for count in counts]
    return Table(columns, cells, title, caption, bold=[n for n, row in enumerate(rows) if row["dataset"] == "mean"])


def _score(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if spread is None else f"{value:.1f} ± {spread:.1f}"


def published_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Published rows as a table, each with how certain it is and where it was read."""
    counts = sorted({int(count) for row in rows for count in row["accuracy"]})
    cells = []
    for row in rows:
        scores = [row["accuracy"].get(str(count)) for count in counts]
        cells.append([row["method"], row["dataset"], *scores, row["certainty"], row["source"]])
    shots = [f"{count} shot{'s' * (count > 1)}" if count else "zero-shot" for count in counts]
    return Table(["published", "dataset", *shots, "read in a", "source"], cells)


def what_ran(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each way in which runs were made, recipe by recipe, and the notes on the data."""
    lines: dict[str, None] = {}
    for result in results:
        ran = result.get("training") or {}
        if ran:
            views = "augmented afresh each epoch" if ran.get("augment_online") else f"{ran['views']} cached views"
            pictures = views if ran.get("augment_online") or ran["views"] else "plain pictures"
            names = {"keep": ", underscores kept", "replace": ", underscores as spaces"}.get(ran["underscores"], "")
            lines[f"recipe {result['recipe']}: {pictures}{names}, embedded by {ran['engine']}"] = None
    notes = sorted({f"{result['dataset']}: {note}" for result in results for note in result["notes"]})
    seen: dict[str, int] = {}
    for result in results:
        seen[result["dataset"]] = max(seen.get(result["dataset"], 0), result.get("seen_in_training", 0))
    notes += [f"{name}: up to {count} test pictures were drawn for training" for name, count in seen.items() if count]
    return [*lines, *notes]


def write_reports(
    results: Sequence[Mapping[str, Any]], output_dir: str | os.PathLike[str], base_model: str
) -> list[Path]:
    """Write `results.csv` (a row per run), `results.md` (means) and, with matplotlib, `accuracy.svg`.

    Returns:
        The files written.
    """
    folder = Path(output_dir)
    columns = ["dataset", "target", "recipe", "shots", "seed", "zero_shot_accuracy", "accuracy"]
    rows = []
    for result in results:
        key = [result["recipe"], result["shots"], result["seed"]]
        rows.append([result["dataset"], "", *key, result["zero_shot_accuracy"], result["accuracy"]])
        for name, pair in result["targets"].items():
            rows.append([result["dataset"], name, *key, pair["zero_shot_accuracy"], pair["accuracy"]])
    write_bytes(folder / "results.csv", Table(columns, rows).csv().encode("utf-8"))
    write_bytes(folder / "results.md", (as_markdown(results, base_model) + "\n").encode("utf-8"))
    files = [folder / "results.csv", folder / "results.md"]
    figure = _figure(summarise(results))
    if figure is not None:
        write_bytes(folder / "accuracy.svg", figure)
        files.append(folder / "accuracy.svg")
    return files


def as_markdown(results: Sequence[Mapping[str, Any]], base_model: str) -> str:
    """The means as a Markdown table, what ran, and below it published figures where they compare."""
    parts = [accuracy_table(summarise(results), count_seeds(results)).markdown()]
    parts += ["\n".join(f"- {line}" for line in what_ran(results))]
    if published := comparable_results(base_model, results):
        parts.append(published_table(published).markdown())
    return "\n\n".join(part for part in parts if part)


def count_seeds(results: Sequence[Mapping[str, Any]]) -> int:
    return len({result["seed"] for result in results})


def _figure(rows: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Accuracy against shots with its spread, one panel per dataset; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = hashlib.sha256(b"taskres").hexdigest()  # the same file for the same numbers
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    colours = {recipe: f"C{number}" for number, recipe in enumerate(sorted({row["recipe"] for row in rows}))}
    columns = min(4, len(names))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * height), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(height, columns, number)
        axes.set_title(name.replace(" -> ", "\n-> "), fontsize=9)
        same = [row for row in rows if row["dataset"] == name]
        for row in same:
            shots, scores = list(row["accuracy"]), list(row["accuracy"].values())
            spread = [row["spread"][count] or 0.0 for count in shots]
            style: Any = {"marker": "o", "markersize": 3, "capsize": 2, "color": colours[row["recipe"]]}
            axes.errorbar(shots, scores, yerr=spread, label=row["recipe"], **style)
        axes.axhline(same[0]["zero_shot"], color="grey", linestyle="--", linewidth=1, label="zero-shot")
        axes.set_xscale("log", base=2)
        shots = list(same[0]["accuracy"])
        axes.set_xticks(shots, [str(count) for count in shots])
        axes.set_xlabel("shots per class", fontsize=8)
        axes.set_ylabel("accuracy (%), mean and std over seeds", fontsize=8)
        axes.tick_params(labelsize=8)
        if number == 1:
            axes.legend(fontsize=7)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
