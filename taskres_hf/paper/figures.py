"""Figures of compared methods: accuracy against shots, and against the time that fitting takes.

Lines and points are labelled where they are, and differ in colour, in line style and in marker, so that twenty can be
told apart, also by those who see no difference between red and green.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..storage import write_bytes

Row = Mapping[str, Any]
# Okabe and Ito's colours without yellow, which is hard to read on white, and with a dark grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
_LINES = ("-", "--", ":", "-.")
_MARKERS = "os^DvP*X<>hpd"
_OURS = "taskres"
_FLAT = "zero-shot"  # has no shots and no time of fitting: a line across
_SIZE = (8.0, 5.6)  # inches


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_figures(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `accuracy.png`, `accuracy.svg`, `time.png` and `time.svg`; nothing without matplotlib.

    Args:
        rows: of `summarise_methods`. Methods without all results are left out.

    Returns:
        The files written.
    """
    rows = [row for row in rows if row["mean"] is not None]
    if not can_draw() or not rows:
        return []
    files = []
    with drawing():
        for name, draw in (("accuracy", _against_shots), ("time", _against_time)):
            figure = draw(rows)
            for ending in ("png", "svg"):
                write_bytes(folder / f"{name}.{ending}", image(figure, ending))
                files.append(folder / f"{name}.{ending}")
    return files


def drawing() -> AbstractContextManager[None]:
    """Around a figure's making and saving: the same file for the same numbers, with text as text."""
    import matplotlib

    options: Any = {"svg.hashsalt": hashlib.sha256(b"taskres").hexdigest(), "svg.fonttype": "none", "font.size": 9}
    return matplotlib.rc_context(options)


def image(figure: Any, kind: str) -> bytes:
    """A figure as `"png"` or `"svg"`."""
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **({"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}))
    return stream.getvalue()


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour, line and marker by method, the same in both figures."""
    styles: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(sorted(row["method"] for row in rows if row["method"] not in (_OURS, _FLAT))):
        styles[name] = {
            "color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _LINES[number // len(_COLOURS) % len(_LINES)], "linewidth": 1.2, "markersize": 4, "zorder": 2,
        }  # fmt: skip
    ours = {"color": "black", "marker": "o", "linestyle": "-", "linewidth": 2.4, "markersize": 5, "zorder": 4}
    flat = {"color": "#7F7F7F", "marker": "", "linestyle": (0, (6, 3)), "linewidth": 1.2, "zorder": 1}
    return {**styles, _OURS: ours, _FLAT: flat}


def _new(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE)
    axes = figure.add_axes((0.09, 0.1, 0.67, 0.86))  # room for names at the right
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _against_shots(rows: Sequence[Row]) -> Any:
    figure, axes = _new("pictures per class (shots)", "accuracy (%), mean; band: standard deviation over seeds")
    styles, ends = _styles(rows), {}
    counts = list(rows[0]["accuracy"])
    for row in rows:
        scores, style = [row["accuracy"][count] for count in counts], styles[row["method"]]
        axes.plot(counts, scores, **style)
        spread = [row["spread"][count] for count in counts]
        if None not in spread and row["method"] != _FLAT:
            low, high = ([score + sign * s for score, s in zip(scores, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(
                counts, low, high, color=style["color"], alpha=0.25 if row["method"] == _OURS else 0.08, linewidth=0
            )
        ends[row["method"]] = (counts[-1], scores[-1])
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    _name_at_the_right(axes, ends, styles)
    return figure


def _name_at_the_right(axes: Any, ends: Mapping[str, tuple[float, float]], styles: Mapping[str, Any]) -> None:
    """Names in a column at the right in the order of accuracy, moved apart, each joined to its point by a thin line."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    order = sorted(ends, key=lambda name: ends[name][1])
    wishes = [(ends[name][1] - bottom) / (top - bottom) for name in order]
    for name, place in zip(order, apart(wishes, min(0.033, 1 / max(len(order), 1))), strict=True):
        axes.annotate(
            name, xy=ends[name], xytext=(1.07, place), textcoords="axes fraction", va="center", fontsize=8,
            color=styles[name]["color"], fontweight="bold" if name == _OURS else "normal", annotation_clip=False,
            arrowprops=_thread(styles[name]),
        )  # fmt: skip


def _thread(style: Mapping[str, Any]) -> dict[str, Any]:
    """The thin line from a name to what it names."""
    line = {"color": style["color"], "linewidth": 0.6, "alpha": 0.7}
    return {**line, "arrowstyle": "-", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Sorted numbers from 0 to 1 moved as little as it takes to be `gap` apart (in groups around their means)."""
    groups: list[list[float]] = []  # sum of wishes, members; each member wishes the place that centres its group
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1 and _start(groups[-1], gap) < _start(groups[-2], gap) + groups[-2][1] * gap:
            total, members = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + members]
    moved = [_start(group, gap) + number * gap for group in groups for number in range(int(group[1]))]
    over = max(0.0, moved[-1] - 1.0) if moved else 0.0
    return [place - over for place in moved]


def _start(group: Sequence[float], gap: float) -> float:
    """Where the first of a group stands when the group lies around the mean of its wishes."""
    return max(group[0] / group[1] - gap * (group[1] - 1) / 2, 0.0)


def _against_time(rows: Sequence[Row]) -> Any:
    count = max(rows[0]["accuracy"])
    figure, axes = _new(f"seconds of fitting at {count} shots, median", f"accuracy (%) at {count} shots, mean")
    styles, ends = _styles(rows), {}
    axes.set_xscale("log")
    for row in rows:
        style = {key: value for key, value in styles[row["method"]].items() if key not in ("linestyle", "linewidth")}
        score = row["accuracy"][count]
        if row["method"] == _FLAT:
            axes.axhline(score, **{key: value for key, value in styles[_FLAT].items() if key != "marker"})
            place: Any = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8}
            axes.annotate(_FLAT, (0.01, score), color=style["color"], **place)
            continue
        seconds = max(row["fit_seconds"], 1e-5)
        axes.plot([seconds], [score], linestyle="", **{**style, "markersize": 7})
        ends[row["method"]] = (seconds, score)
    _name_at_the_right(axes, ends, styles)
    return figure
