"""How recipe `auto` was chosen: accuracy on held-out training and validation pictures of the shipped tasks.

    python -m benchmarks.recipes

Measured on pictures of things (emoji) that are not among the shots, so that a recipe is not rewarded for recognising a
thing it was trained on in another style. The test splits are not touched.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

import torch

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.evaluation import accuracy
from taskres_hf.few_shot import few_shot_indices

SHOTS = (1, 2, 4, 8, 16)


def candidates() -> dict[str, dict[str, Any]]:
    """Name to settings; `strength` is the penalty times the number of shots."""
    found: dict[str, dict[str, Any]] = {"paper": {"recipe": "paper"}}
    for strength in (0.0, 1.0, 3.0, 10.0):
        found[f"penalty {strength:g} / shots"] = {"recipe": "auto", "strength": strength}
    found["paper, enhanced base"] = {"recipe": "paper", "enhanced_base": True}
    found["penalty 3 / shots, enhanced base"] = {"recipe": "auto", "strength": 3.0, "enhanced_base": True}
    return found


def run(
    model: TaskResCLIPForImageClassification,
    data: dict[str, ImageFeatures],
    things: list[str] | None,
    shots: int,
    seed: int,
    settings: dict[str, Any],
) -> tuple[float, float]:
    """Zero-shot and trained accuracy of one draw on the pictures outside it."""
    train, settings = data["train"], dict(settings)
    rows = few_shot_indices(train.labels.tolist(), shots, seed, on_short="ignore")
    seen = {things[row] for row in rows} if things else set()
    drawn = set(rows)
    rest = [row for row in range(len(train)) if row not in drawn and (things is None or things[row] not in seen)]
    embeds = torch.cat([train.image_embeds[0][rest], data["validation"].image_embeds[0]])
    labels = torch.cat([train.labels[rest], data["validation"].labels])
    if "strength" in settings:
        settings["penalty"] = settings.pop("strength") / shots
    model.classifier.reset()
    arguments = TaskResTrainingArguments(seed=seed, on_short="ignore", disable_tqdm=True, **settings)
    TaskResTrainer(model, arguments, train.select(rows)).train()
    with torch.no_grad():
        head = model.classifier
        return 100 * accuracy(head.zero_shot_logits(embeds), labels), 100 * accuracy(head(embeds), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(1, parser.parse_args().seeds + 1)
    tasks: dict[str, Any] = {}
    for task, spec in demo_tasks().items():
        splits = demo_dataset(task)
        model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
        trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
        data = {name: trainer.embed(splits[name]) for name in ("train", "validation")}
        things = None if task == "digits" else list(splits["train"]["hexcode"])
        tasks[task] = (model, data, things)
    print("| recipe | " + " | ".join(f"{shots} shots" for shots in SHOTS) + " |")
    print("|---|" + "---:|" * len(SHOTS))
    zero: dict[int, list[float]] = {}
    for name, settings in candidates().items():
        cells = []
        for shots in SHOTS:
            results = [run(*tasks[task], shots, seed, settings) for task in tasks for seed in seeds]
            zero[shots] = [before for before, _ in results]
            cells.append(f"{mean(after for _, after in results):.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("| zero-shot | " + " | ".join(f"{mean(zero[shots]):.1f}" for shots in SHOTS) + " |")


if __name__ == "__main__":
    main()
