"""Train a classifier on any image dataset and measure it.

python examples/train.py --dataset photos --base-model openai/clip-vit-base-patch32 --shots 16
torchrun --standalone --nproc_per_node 2 examples/train.py        # two processes, the shipped pictures
"""

from __future__ import annotations

import argparse

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments, load_training_data
from taskres_hf.demo import demo_dataset, demo_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="Hub id, parquet folder or image folder (default: shipped pictures)")
    parser.add_argument("--base-model", default=demo_model())
    parser.add_argument("--template", default="a drawing of a {}.")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--output-dir", default="taskres-output")
    options = parser.parse_args()

    data = load_training_data(options.dataset or demo_dataset("people"))
    model = TaskResCLIPForImageClassification.from_base(options.base_model, data.train.class_names, options.template)
    trainer = TaskResTrainer(
        model,
        TaskResTrainingArguments(options.output_dir, shots=options.shots),
        train_dataset=data.train,
        eval_dataset=data.held_out,
    )
    trainer.train()
    metrics = trainer.measure()  # on the held-out split, or by cross-validation where there is none
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        print("\n".join(data.account.lines()))
        print(f"zero-shot {metrics['zero_shot_accuracy']:.3f}, trained {metrics['accuracy']:.3f}, {metrics['method']}")


if __name__ == "__main__":
    main()
