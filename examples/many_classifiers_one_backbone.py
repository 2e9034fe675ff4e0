"""Several classifiers over one backbone: one pass over a picture, one matrix product for all of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from taskres_hf import ClassifierPool, TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.pool import pack_with_base


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    for task in ("animals-plants", "food"):
        spec, splits = demo_tasks()[task], demo_dataset(task)
        model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
        TaskResTrainer(model, TaskResTrainingArguments(shots=4, on_short="ignore"), splits["train"]).train()
        model.save_pretrained(folder / task)

    pool = ClassifierPool.from_folders(folder)
    pictures = [demo_dataset("food")["test"][row]["image"] for row in (0, 1)]
    for answers in pool.classify(pictures):  # each picture by all of them, embedded once
        print({name: top[0]["label"] for name, top in answers.items()})
    for (best,) in pool.classify(pictures, each=["food", "animals-plants"]):  # each by its own
        print(best["label"])

    pool.add("food", folder / "animals-plants")  # exchanged by name, while other threads may ask
    print(pool["food"].class_names)

    pack_with_base(sorted(folder.iterdir()), folder / "pool.safetensors")  # as `taskres pack` does
    print(ClassifierPool.from_pretrained(folder / "pool.safetensors"))


if __name__ == "__main__":
    main()
