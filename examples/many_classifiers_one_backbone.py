"""Serve several classifiers over one backbone: one pass over a picture, one small matrix product per task."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tasks = ("animals-plants", "food")
    for task in tasks:
        spec, splits = demo_tasks()[task], demo_dataset(task)
        model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
        TaskResTrainer(model, TaskResTrainingArguments(shots=4, on_short="ignore"), splits["train"]).train()
        model.save_pretrained(folder / task)

    shared = TaskResCLIPForImageClassification.from_pretrained(folder / tasks[0])
    classifiers = {
        task: TaskResCLIPForImageClassification.from_pretrained(folder / task, base_model=shared.clip) for task in tasks
    }
    picture = demo_dataset("food")["test"][0]["image"].convert("RGB")
    pixels = shared.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        embeds = shared.get_image_features(pixels)  # once, whatever the number of tasks
        for task, classifier in classifiers.items():
            best = int(classifier(image_embeds=embeds).logits.argmax())
            print(f"{task}: {classifier.class_names[best]}")


if __name__ == "__main__":
    main()
