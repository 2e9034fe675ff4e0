"""How recipe `auto-v1` was chosen: accuracy on held-out training and validation pictures of the shipped tasks.

    python -m benchmarks.recipes

Measured on pictures of things (emoji) that are not among the shots, so that a recipe is not rewarded for recognising a
thing it was trained on in another style. The test splits are not touched.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.paper.reports import accuracy_table, summarise
from taskres_hf.paper.runner import Cell, few_shot_runs, grid


def candidates() -> dict[str, dict[str, Any]]:
    """Name to settings; `strength` is the penalty times the number of shots."""
    settings: dict[str, dict[str, Any]] = {"paper": {"recipe": "paper"}}
    for strength in (0.0, 1.0, 3.0, 10.0):
        settings[f"penalty {strength:g} / shots"] = {"recipe": "auto-v1", "strength": strength}
    settings["paper, enhanced base"] = {"recipe": "paper", "enhanced_base": True}
    settings["penalty 3 / shots, enhanced base"] = {"recipe": "auto-v1", "strength": 3.0, "enhanced_base": True}
    return settings


def runs(task: str, shots: Sequence[int], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every candidate on every draw of a task, measured on the pictures outside the draw."""
    spec, splits, settings = demo_tasks()[task], demo_dataset(task), candidates()
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
    train, validation = (trainer.embed(splits[name]) for name in ("train", "validation"))
    things = None if task == "digits" else list(splits["train"]["hexcode"])

    def draw(cell: Cell) -> list[int]:
        return few_shot_indices(train.labels.tolist(), cell.shots, cell.seed, on_short="ignore")

    def outside(cell: Cell) -> dict[str, tuple[ImageFeatures, None]]:
        rows = set(draw(cell))
        seen = {things[row] for row in rows} if things else set()
        rest = [row for row in range(len(train)) if row not in rows and (things is None or things[row] not in seen)]
        embeds = torch.cat([train.image_embeds[:, rest], validation.image_embeds], dim=1)
        labels = torch.cat([train.labels[rest], validation.labels])
        return {"": (ImageFeatures(embeds, labels, train.class_names, ""), None)}

    def options(cell: Cell) -> dict[str, Any]:
        values = dict(settings[cell.recipe])
        strength = values.pop("strength", None)
        return values if strength is None else {**values, "penalty": strength / cell.shots}

    cells = grid(task, shots, seeds, list(settings))
    measured = few_shot_runs(model, cells, lambda cell: train.select(draw(cell)), outside, options)
    return [
        {
            **asdict(cell), "zero_shot_accuracy": scores[""][0], "accuracy": scores[""][1], "targets": {},
        }
        for cell, scores in measured
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=(1, 2, 4, 8, 16))
    parser.add_argument("--tasks", nargs="+", default=list(demo_tasks()))
    options = parser.parse_args()
    seeds = range(1, options.seeds + 1)
    results = [result for task in options.tasks for result in runs(task, options.shots, seeds)]
    rows = [row for row in summarise(results) if row["dataset"] == "mean" or len(options.tasks) == 1]
    print(accuracy_table(rows, options.seeds, on="pictures outside the shots").markdown())


if __name__ == "__main__":
    main()
