"""`python docs/figures.py`: the figures of the pages, from the tables of docs/results.md and the shipped pictures.

accuracy.svg        accuracy against shots on photographs, from the table that `python -m benchmarks.methods` prints
idea.svg            what is frozen, what is trained, what is stored
before-after.svg    test pictures of three shipped classes in the plane that decides between them
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
METHODS = {
    "taskres": "taskres_hf", "linear-probe-cv": "linear probe, C by cross-validation", "gda": "GDA",
    "tip-adapter": "Tip-Adapter", "clap": "CLAP", "zero-shot": "zero-shot",
}  # fmt: skip
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F")
_TASK, _SHOTS = "digits", 4


def table(heading: str) -> dict[str, list[float]]:
    """Numbers of a table of docs/results.md by its first column, without spreads; the first of each name."""
    text = (DOCS / "results.md").read_text(encoding="utf-8").split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    rows: dict[str, list[float]] = {}
    for line in text.splitlines():
        if match := re.match(r"\| ([^|]+?) \|(.+)\|$", line):
            cells = [re.match(r"[-+]?[\d.]+", cell.strip()) for cell in match.group(2).split("|")]
            rows.setdefault(match.group(1), [float(cell.group()) for cell in cells if cell])
    return rows


def accuracy() -> Figure:
    """Mean accuracy of some methods against shots, named at their lines."""
    shots, rows = (1, 2, 4, 8, 16), table("Photographs, all methods")
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.add_subplot()
    for (name, title), colour in zip(METHODS.items(), _COLOURS, strict=True):
        style: Any = {"color": colour, "linewidth": 2.6 if name == "taskres" else 1.3, "label": title}
        flat = {"linestyle": (0, (5, 3))} if name == "zero-shot" else {"marker": "o", "markersize": 4}
        axes.plot(shots, rows[name][:5], **style, **flat)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(count) for count in shots])
    axes.minorticks_off()
    axes.set(xlabel="labelled pictures a class", ylabel="accuracy on test pictures (%)")
    axes.set_title("Mean over six tasks of photographs and five draws", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def idea() -> Figure:
    """Boxes and arrows: pictures and class names through frozen towers, and the residual between."""
    figure = Figure(figsize=(8.4, 3.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 84), ylim=(0, 33))
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, colour: str, bold: bool = False) -> None:
        from matplotlib.patches import FancyBboxPatch

        shape = FancyBboxPatch((x, y), width, 6, boxstyle="round,pad=0.4", facecolor=colour, edgecolor="#555555")
        axes.add_patch(shape)
        weight = "bold" if bold else "normal"
        axes.text(x + width / 2, y + 3, text, ha="center", va="center", fontsize=9, fontweight=weight)

    def arrow(start: tuple[float, float], end: tuple[float, float]) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#555555", "linewidth": 1.2})

    frozen, trained, plain = "#DCE6F2", "#FBE3C8", "#FFFFFF"
    box(2, 24, 14, "pictures", plain)
    box(24, 24, 16, "image tower\n(frozen)", frozen)
    box(48, 24, 12, "f  [N, D]", plain)
    box(2, 8, 14, "class names\nin prompts", plain)
    box(24, 8, 16, "text tower\n(frozen)", frozen)
    box(48, 8, 12, "t  [K, D]", plain)
    box(48, 0.2, 12, "x  [K, D]", trained, bold=True)
    box(68, 16, 13, "logits\n[N, K]", plain)
    for y in (27, 11):
        arrow((16.6, y), (23.4, y))
        arrow((40.6, y), (47.4, y))
    arrow((60.6, 27), (68, 22.6))
    arrow((60.6, 11), (68, 15.6))
    arrow((60.6, 3.4), (70, 15.4))
    axes.text(64, 3.0, "+ alpha x", fontsize=9)
    axes.text(
        2, 2.2, "Trained and stored: x alone, kilobytes.\nEverything blue stays as it was downloaded.", fontsize=8.5
    )
    axes.text(62.6, 26.4, "cosine, scaled", fontsize=9)
    return figure


def before_after() -> Figure:
    """Test pictures of three classes, zero-shot and trained.

    Three logits differ in two directions only, so a plane shows them without loss: the class is the sector in which a
    picture lies.
    """
    import torch

    from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
    from taskres_hf.demo import demo_dataset, demo_model, demo_tasks

    splits = demo_dataset(_TASK)
    names = splits["train"].features["label"].names
    chosen = [1, 2, 3]

    def part(split: str) -> Any:
        rows = splits[split].filter(lambda label: label in chosen, input_columns="label")
        return (
            rows.map(lambda row: {"name": names[row["label"]]}).remove_columns("label").rename_column("name", "label")
        )

    classes = [names[label] for label in chosen]
    model = TaskResCLIPForImageClassification.from_base(demo_model(), classes, demo_tasks()[_TASK]["template"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(shots=_SHOTS, seed=1), part("train"), part("test"))
    features = trainer.embed(part("test"))
    embeds, labels = features.image_embeds[0], features.labels
    with torch.inference_mode():
        zero_shot = model.zero_shot_logits(image_embeds=embeds)
    trainer.train()
    with torch.inference_mode():
        trained = model(image_embeds=embeds).logits
    corners = torch.tensor([[math.cos(a), math.sin(a)] for a in (math.pi / 2, 7 * math.pi / 6, 11 * math.pi / 6)])
    figure = Figure(figsize=(8.4, 4.1), layout="constrained")
    for number, (title, logits) in enumerate((("zero-shot", zero_shot), (f"{_SHOTS} pictures a class", trained)), 1):
        axes = figure.add_subplot(1, 2, number, aspect="equal")
        places = (logits - logits.mean(1, keepdim=True)) @ corners
        reach = 1.15 * float(places.abs().max())
        for colour, name, corner, marker, label in zip(_COLOURS[1:], classes, corners, "os^", range(3), strict=False):
            mine = places[labels == label]
            axes.scatter(
                mine[:, 0], mine[:, 1], s=22, color=colour, marker=marker, label=name, alpha=0.75, linewidths=0
            )
            axes.plot([0, -2 * reach * corner[0]], [0, -2 * reach * corner[1]], color="#999999", linewidth=1)
            spot = 0.82 * reach * corner
            axes.text(float(spot[0]), float(spot[1]), name, color=colour, ha="center", va="center", fontsize=10)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
        right = float((logits.argmax(1) == labels).float().mean())
        axes.set_title(f"{title}: {100 * right:.0f} % of {len(labels)} test pictures right", fontsize=10)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"accuracy": accuracy, "idea": idea, "before-after": before_after}


def draw(folder: Path, names: Iterator[str] | None = None) -> list[Path]:
    """Write the figures; the same bytes for the same numbers."""
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "taskres", "svg.fonttype": "none", "font.size": 9}):
        for name in names or FIGURES:
            files.append(folder / f"{name}.svg")
            figure = FIGURES[name]()
            figure.savefig(files[-1], format="svg", metadata={"Date": None}, facecolor="white")
    return files


if __name__ == "__main__":
    print(*draw(DOCS / "images"), sep="\n")
