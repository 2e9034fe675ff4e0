"""The same classifier under `transformers.Trainer`, unchanged; its checkpoints hold the residual alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from taskres_hf import TaskResCLIPForImageClassification, sample_few_shot
from taskres_hf.demo import demo_dataset, demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", default="taskres-output")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    splits = demo_dataset("faces")
    names = splits["train"].features["label"].names
    model = TaskResCLIPForImageClassification.from_base(demo_model(), names, "an emoji of a {}.")
    processor = model.image_processor

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = processor(images=[row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["label"] for row in rows])}

    trainer = Trainer(
        model,
        TrainingArguments(
            options.output_dir,
            num_train_epochs=options.epochs,
            learning_rate=0.05,
            per_device_train_batch_size=32,
            remove_unused_columns=False,  # the pictures are needed by `collate`
            report_to=[],
        ),
        data_collator=collate,
        train_dataset=sample_few_shot(splits["train"], shots=5),
        eval_dataset=splits["test"],
    )
    print("before", trainer.evaluate()["eval_loss"])
    trainer.train()
    print("after", trainer.evaluate()["eval_loss"])
    model.save_pretrained(f"{options.output_dir}/artifact")


if __name__ == "__main__":
    main()
