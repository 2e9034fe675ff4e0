"""Tables and figures of magnitude against difficulty: a row or a point a task, each with its name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..paper.figures import can_draw, drawing, image
from ..tables import Table, visible
from .magnitude import DIFFICULTIES, MAGNITUDES, MEASURES, RankCorrelation, rank_correlation, rank_correlation_within

__all__ = [
    "can_draw", "class_correlation_table", "correlation_table", "draw_scatter", "draw_transfer", "measure_name",
    "task_table",
]  # fmt: skip

SHOWN = ("mean_abs", "relative_length", "turn", "turn_apart", "changed", "gain")  # measures in tables

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")  # Okabe and Ito's
_MARKERS = "os^DvP*"
# The published pair, and the pair that depends on neither the number of classes nor on lengths.
_PANELS = (("rtd", "mean_abs"), ("normalised_error", "turn_apart"))


# ---------------------------------------------------------------------- tables


def measure_name(key: str) -> str:
    """A measure in the words of tables."""
    return "gain over zero-shot" if key == "gain" else MEASURES[key]


def shots_given(rows: Sequence[Mapping[str, Any]], shots: int) -> int | str:
    """What was asked for as shots, in words where a class of one of these rows has fewer pictures."""
    own = [row.get("fewest", shots) for row in rows if row["shots"] == shots]
    return f"up to {shots}" if min(own, default=shots) < shots else shots


def task_table(rows: Sequence[Mapping[str, Any]], recipe: str, shots: int) -> Table:
    """Difficulty and magnitude of each task, the hardest first."""
    chosen = [row for row in rows if (row["recipe"], row["shots"]) == (recipe, shots)]
    chosen.sort(key=lambda row: -(row["zero_shot_error"] or 0.0))
    columns = ["task", "K", "zero-shot", "accuracy", "RTD", "error / chance's"]
    columns += [MEASURES[name] for name in SHOWN if name != "gain"]
    cells = [
        [
            row["dataset"], row["num_classes"], 100 * row["zero_shot_accuracy"], 100 * row["accuracy"],
            _number(row["rtd"]), _number(row["normalised_error"]), f"{row['mean_abs']:.3f}",
            f"{row['relative_length']:.3f}", f"{row['turn']:.1f}", f"{row['turn_apart']:.1f}",
            f"{100 * row['changed']:.1f}",
        ]
        for row in chosen
    ]  # fmt: skip
    seeds = max((row["seeds"] for row in chosen), default=0)
    given = shots_given(chosen, shots)
    title = f"Recipe {recipe}, {given} shot{'s' * (shots > 1)}, mean over {seeds} seed{'s' * (seeds > 1)}"
    caption = "RTD: (1 / K) / zero-shot accuracy, as published. Accuracies and answers changed in percent."
    short = [f"{row['dataset']} ({row['fewest']})" for row in chosen if row.get("fewest", shots) < shots]
    if short:
        caption += f" With a class of fewer pictures, which gave all it has: {', '.join(short)}."
    return Table(columns, cells, title, caption)


def correlation_table(found: Sequence[Mapping[str, Any]], shots: Sequence[int], title: str = "") -> Table:
    """Rank correlations over tasks: a row a recipe, number of shots and measure, a column a difficulty."""
    places: dict[tuple[Any, ...], dict[str, RankCorrelation]] = {}
    for row in found:
        if row["shots"] in shots and row["measure"] in SHOWN:
            place = places.setdefault((row["recipe"], row["shots"], row["measure"]), {})
            place[row["difficulty"]] = row["correlation"]
    cells = [
        [recipe, shots_given(found, count), measure_name(measure), *(str(place[name]) for name in DIFFICULTIES)]
        for (recipe, count, measure), place in places.items()
    ]
    caption = (
        "Spearman, 95 % interval by resampling the tasks, p by permuting them; "
        f"{len(cells) * len(DIFFICULTIES)} correlations, for which p is not corrected."
    )
    return Table(["recipe", "shots", "with", *DIFFICULTIES.values()], cells, title or _OVER_TASKS, caption)


_OVER_TASKS = "Rank correlation over tasks of difficulty with magnitude and gain"


def class_correlation_table(found: Sequence[Mapping[str, Any]], shots: Sequence[int], title: str = "") -> Table:
    """Rank correlations over the classes within each task: a column a recipe."""
    chosen = [row for row in found if row["shots"] in shots and row["measure"] in SHOWN]
    recipes = list(dict.fromkeys(row["recipe"] for row in chosen))
    places: dict[tuple[int, str], dict[str, str]] = {}
    for row in chosen:
        places.setdefault((row["shots"], row["measure"]), {})[row["recipe"]] = str(row["correlation"])
    cells = [
        [shots_given(chosen, count), measure_name(measure), *(place.get(recipe, "") for recipe in recipes)]
        for (count, measure), place in places.items()
    ]
    caption = "Mean over tasks of Spearman within each; 95 % interval by resampling tasks, p by permuting classes."
    return Table(
        ["shots", "with", *recipes],
        cells,
        title or "Rank correlation over classes, within each task, of zero-shot error with magnitude and gain",
        caption,
    )


def _number(value: float | None) -> str:
    return "" if value is None else "infinite" if math.isinf(value) else f"{value:.3f}"


# ---------------------------------------------------------------------- figures


def draw_transfer(
    rows: Sequence[Mapping[str, Any]], name: str = "transfer", groups: Mapping[str, str] | None = None
) -> dict[str, bytes]:
    """Magnitude against difficulty at the most shots, as PNG and SVG: a row of panels a recipe.

    Args:
        rows: of `analyzing.task_rows`. groups: dataset to what it is of, such as its kind, which colours its point.

    Returns:
        Names of files to their content; none without matplotlib or rows.
    """
    most = max((row["shots"] for row in rows), default=0)
    chosen = [row for row in rows if row["shots"] == most and row["rtd"] is not None]
    if not can_draw() or not chosen:
        return {}
    from matplotlib.figure import Figure

    recipes = list(dict.fromkeys(row["recipe"] for row in chosen))
    with drawing():
        figure = Figure(figsize=(9.6, 3.9 * len(recipes)), layout="constrained")
        all_axes = figure.subplots(len(recipes), len(_PANELS), squeeze=False)
        for line, recipe in zip(all_axes, recipes, strict=True):
            own = [row for row in chosen if row["recipe"] == recipe]
            for axes, (difficulty, measure) in zip(line, _PANELS, strict=True):
                points = [(row["dataset"], row[difficulty], row[measure]) for row in own]
                axes.set_title(f"recipe {recipe}, {shots_given(chosen, most)} shots", fontsize=9, loc="left")
                _scatter(axes, points, groups or {})
                axes.set_xlabel(DIFFICULTIES[difficulty] + (" (as published)" if difficulty == "rtd" else ""))
                axes.set_ylabel(MAGNITUDES[measure] + (" (as published)" if measure == "mean_abs" else ""))
        return _saved(figure, name)


def draw_scatter(
    panels: Sequence[tuple[str, str, str, Sequence[tuple[str, float, float]]]],
    name: str,
    groups: Mapping[str, str] | None = None,
    named: bool = True,
) -> dict[str, bytes]:
    """Panels side by side, as PNG and SVG; nothing without matplotlib.

    Args:
        panels: title, what goes across and up, and points (name, across, up). groups: name to a group that colours it.
        named: whether each point has its name beside it; else the correlation shown is that within groups.
    """
    if not can_draw():
        return {}
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(4.8 * len(panels), 3.9), layout="constrained")
        for axes, (title, across, up, points) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.set_title(title, fontsize=9, loc="left")
            _scatter(axes, points, groups or {}, named)
            axes.set_xlabel(across)
            axes.set_ylabel(up)
        return _saved(figure, name)


def _saved(figure: Any, name: str) -> dict[str, bytes]:
    return {f"{name}.{ending}": image(figure, ending) for ending in ("png", "svg")}


def _scatter(
    axes: Any, points: Sequence[tuple[str, float, float]], groups: Mapping[str, str], named: bool = True
) -> None:
    """Points, coloured by group, and their rank correlation: of all with names, else within groups."""
    found = [(name, x, y) for name, x, y in points if math.isfinite(x) and math.isfinite(y)]
    kinds = list(dict.fromkeys(groups.get(name, "") for name, _, _ in found))
    for number, kind in enumerate(kinds):
        own = [(x, y) for name, x, y in found if groups.get(name, "") == kind]
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.scatter(*zip(*own, strict=True), s=22, label=kind or None, zorder=3, **style)
    axes.margins(0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    if named:
        _name(axes, found)
    if any(kinds):
        axes.legend(fontsize=8, loc="best", framealpha=0.7, edgecolor="none")
    x, y = [across for _, across, _ in found], [up for _, _, up in found]
    told = rank_correlation(x, y) if named else rank_correlation_within(x, y, [groups.get(name) for name, *_ in found])
    axes.set_title(f"{axes.get_title(loc='left')}\nrank correlation {told}", fontsize=9, loc="left")


# Of a name's middle from its point, in parts of its width and height: beside it first, farther off where that is taken.
_PLACES = [(0.6, 0), (-0.6, 0), (0.5, 1), (-0.5, 1), (0.5, -1), (-0.5, -1), (0, 1.3), (0, -1.3)]
_PLACES += [(0.6 * side, step) for step in (1.9, -1.9, 2.8, -2.8, 3.7, -3.7) for side in (1, -1)]


def _name(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, where they cover neither a point nor another name, with a thin line to those farther off."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    where = {name: ((x - left) / (right - left), (y - bottom) / (top - bottom)) for name, x, y in points}
    taken = [(x, y, 0.02, 0.03) for x, y in where.values()]  # middle, width and height, in parts of the panel
    for name, (x, y) in sorted(where.items(), key=lambda entry: entry[1]):
        width, height = 0.015 * len(name) + 0.02, 0.045
        tried = [(x + width * across, y + height * up, width, height) for across, up in _PLACES]
        free = [box for box in tried if _inside(box) and not any(_overlap(box, other) for other in taken)]
        box = (free or tried)[0]
        taken.append(box)
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            visible(name).replace("$", r"\$"), (x, y), xytext=box[:2], xycoords="axes fraction",
            textcoords="axes fraction", fontsize=7, ha="center", va="center", color="#333333",
            arrowprops=line if abs(box[1] - y) > 1.5 * height else None,
        )  # fmt: skip


def _inside(box: tuple[float, ...]) -> bool:
    return all(box[k] - box[k + 2] / 2 >= 0.0 and box[k] + box[k + 2] / 2 <= 1.0 for k in (0, 1))


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(abs(one[k] - other[k]) < (one[k + 2] + other[k + 2]) / 2 for k in (0, 1))
