"""Trains on cached embeddings and on pictures augmented online; a script, so that it also runs in several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks

MODES = ("cached", "online")


def train(folder: Path, mode: str) -> tuple[int, float, float] | None:
    """Number of processes, accuracy and last loss, in the main process; the classifier is saved in `folder / mode`."""
    spec, splits = demo_tasks()["food"], demo_dataset("food")
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    arguments = TaskResTrainingArguments(
        output_dir=str(folder / mode), shots=5, train_batch_size=10, num_train_epochs=12, closed_form=False,
        disable_tqdm=True, cache_dir=False, use_cpu=True, save_epochs=6, on_short="ignore",
        augment_online=mode == "online",
    )  # fmt: skip
    trainer = TaskResTrainer(model, arguments, splits["train"], splits["test"])
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(folder / mode)
    if not trainer.accelerator.is_main_process:
        return None
    return trainer.accelerator.num_processes, metrics["accuracy"], trainer.log_history[-1]["loss"]


if __name__ == "__main__":
    for mode in MODES:
        found = train(Path(sys.argv[1]), mode)
        if found:
            print(json.dumps([mode, *found]))
