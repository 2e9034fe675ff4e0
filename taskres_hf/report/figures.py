"""Figures of a report, as PNG or SVG: accuracy per class beside zero-shot, confidence beside accuracy, confusions.

Marks differ in shape as well as in colour, and text in an SVG stays text.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..artifact import CONFIG
from ..errors import DataError, MissingExtraError, TaskResError
from ..storage import read_json
from ..tables import visible
from .findings import Calibration, class_rows, overall_row

# In a page these become CSS variables of the same names, which differ in the dark.
COLOURS = {"ink": "#1c2024", "line": "#d3d8dd", "before": "#b34700", "after": "#005fa3", "other": "#5b6570"}
MOST_CLASSES = 40  # in a figure; of more classes, those that changed most
_LONGEST_NAME = 24


def check_can_draw() -> None:
    """Raises MissingExtraError without matplotlib."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError('A report needs the package matplotlib: pip install "taskres_hf[report]".')


def figure_for_card(folder: str | os.PathLike[str]) -> bytes | None:
    """`accuracy_figure` of a saved artifact's own metrics; None without them, or without matplotlib."""
    with suppress(TaskResError):  # what is wrong with a folder, whoever reads it whole says
        return accuracy_figure(read_json(Path(folder) / CONFIG).get("metrics") or {})
    return None


def accuracy_figure(metrics: Mapping[str, Any], kind: str = "png") -> bytes:
    """Accuracy of each class, trained beside zero-shot: the one figure that says whether training was worth it.

    Args:
        metrics: of `TaskResTrainer.evaluate`, `measure` or `cross_validate`, or `model.config.metrics`.
        kind: `"png"` or `"svg"`.

    Returns:
        The file. Bars are 95 % intervals (Wilson) of the trained classifier. Of more than 40 classes those are shown
        that changed most.

    Raises:
        DataError: the metrics have no accuracy per class. MissingExtraError: matplotlib is not installed.
    """
    check_can_draw()
    rows = class_rows(metrics)
    if not rows:
        raise DataError("The metrics have no accuracy per class (`per_class`): measure the classifier first.")
    shown = sorted(rows, key=lambda row: -abs(row["gain"] or 0.0))[:MOST_CLASSES]
    shown.sort(key=lambda row: row["gain"] or 0.0)
    shown.append({"name": "all pictures", **overall_row(metrics)})
    figure, axes = _new(5.2, 1.3 + 0.25 * len(shown))
    for place, row in enumerate(shown):
        before, after = row["before"], row["after"]
        low, high = row["interval"]
        axes.plot([100 * low, 100 * high], [place, place], color=COLOURS["after"], linewidth=1, alpha=0.45, zorder=2)
        if before is not None:
            axes.plot([100 * before, 100 * after], [place] * 2, color=COLOURS["other"], linewidth=2.4, zorder=3)
            axes.plot([100 * before], [place], **_mark("before", "D"))
        axes.plot([100 * after], [place], **_mark("after", "o"))
    axes.set_yticks(range(len(shown)), [f"{_name(row['name'])} ({row['support']})" for row in shown])
    axes.axhline(len(shown) - 1.5, color=COLOURS["line"], linewidth=0.8)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlim(-2, 102)
    part = f", the {len(shown) - 1} of {len(rows)} classes that changed most" if len(shown) <= len(rows) else ""
    axes.set_xlabel(f"accuracy (%) and 95 % interval{part}")
    _legend(axes, [("before", "D", "zero-shot"), ("after", "o", "trained")])
    return _saved(figure, kind, "accuracy")


def reliability_figure(found: Sequence[Calibration], kind: str = "png") -> bytes:
    """Accuracy against confidence, a line for each classifier; on the diagonal one is as sure as it is right.

    The legend gives each one's expected calibration error.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_can_draw()
    styles = {
        "trained": ("after", "o", "-"), "zero-shot": ("before", "D", "--"), "before temperature": ("other", "s", ":"),
    }  # fmt: skip
    figure, axes = _new(4.6, 4.6)
    axes.plot([0, 100], [0, 100], color=COLOURS["line"], linewidth=1.5, zorder=1)
    legend = []
    for entry in found:
        colour, marker, line = styles[entry.name]
        points = [(100 * row["confidence"], 100 * row["accuracy"]) for row in entry.bins]
        axes.plot(*zip(*points, strict=True), linestyle=line, linewidth=1.6, **_mark(colour, marker))
        legend.append((colour, marker, f"{entry.name} ({100 * entry.error:.1f} %)"))
    axes.set(xlim=(-2, 102), ylim=(-2, 102), xlabel="confidence (%)", ylabel="accuracy (%)")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.6)
    _legend(axes, legend)
    return _saved(figure, kind, "reliability")


def confusion_figure(counts: Any, class_names: Sequence[str], kind: str = "png") -> bytes:
    """Counts [K, K] of labels (rows) and answers (columns), each row shaded by its share.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    check_can_draw()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    size = 2.2 + 0.32 * len(class_names)
    figure, axes = _new(size + 0.8, size)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    for a, b in counts.nonzero().tolist():
        colour = "white" if shares[a, b] > 0.55 else COLOURS["ink"]
        axes.text(b, a, str(int(counts[a, b])), ha="center", va="center", fontsize=7, color=colour)
    names = [_name(name) for name in class_names]
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.grid(visible=False)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    return _saved(figure, kind, "confusion")


def _new(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_color(COLOURS["line"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=COLOURS["line"], labelcolor=COLOURS["ink"], labelsize=9)
    axes.xaxis.label.set_color(COLOURS["ink"])
    axes.yaxis.label.set_color(COLOURS["ink"])
    axes.grid(axis="x", color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _mark(colour: str, marker: str) -> dict[str, Any]:
    return {"color": COLOURS[colour], "marker": marker, "markersize": 5.5 if marker == "o" else 4.5, "zorder": 4}


def _legend(axes: Any, entries: Sequence[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", label=label, **_mark(colour, mark)) for colour, mark, label in entries]
    axes.figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 2),
        fontsize=9,
        frameon=False,
        labelcolor=COLOURS["ink"],
    )


def _name(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…"


def _saved(figure: Any, kind: str, salt: str) -> bytes:
    """The same file for the same numbers; PNG on white, SVG on whatever it lies on."""
    import matplotlib

    for axes in figure.axes:  # a name with two dollar signs is no formula
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)
    stream = io.BytesIO()
    options: Any = {"svg.hashsalt": f"taskres-{salt}", "svg.fonttype": "none", "svg.id": f"figure-{salt}"}
    options = {key: value for key, value in options.items() if key in matplotlib.rcParams}
    with matplotlib.rc_context(options), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a script that the font does not have
        if kind == "svg":
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(stream, format="svg", metadata=nothing)
        else:
            figure.savefig(stream, format="png", dpi=200, facecolor="white")
    return stream.getvalue()
