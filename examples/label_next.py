"""From pictures without any label to a classifier, asking for the labels that help most.

python examples/label_next.py --rounds 3 --labels 20

The shipped pictures play the pool, and their hidden labels the person who is asked.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from taskres_hf import (
    TaskResCLIPForImageClassification,
    TaskResTrainer,
    TaskResTrainingArguments,
    load_training_data,
)
from taskres_hf.analysis.suggesting import suggest_pictures
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits", choices=list(demo_tasks()))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--labels", type=int, default=20, help="pictures to label a round")
    options = parser.parse_args()

    spec, splits = demo_tasks()[options.task], demo_dataset(options.task)
    arguments = TaskResTrainingArguments(on_short="ignore", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as folder:
        truth = {}
        for number, row in enumerate(splits["train"]):
            file = Path(folder) / f"{number}.png"
            row["image"].convert("RGB").save(file)
            truth[str(file)] = spec["classes"][row["label"]]

        model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
        labels = Path(folder) / "labels.csv"
        for _ in range(options.rounds):
            known = str(labels) if labels.exists() else None
            found = suggest_pictures(model, folder, options.labels, labelled=known, args=arguments)
            rows = [(row["file"], row["label"]) for row in found.labelled]
            rows += [(row["file"], truth[row["file"]]) for row in found.pictures]  # a person's part
            labels.write_text("\n".join(["file,label", *(f"{Path(file).name},{label}" for file, label in rows)]))
            model = train(labels, spec, arguments)
            accuracy = TaskResTrainer(model, arguments).evaluate(splits["test"])["accuracy"]
            needing = ", ".join(row["class"] for row in found.classes[:3])
            print(f"{len(rows)} labels: {100 * accuracy:.1f} % of test pictures. Before, these needed most: {needing}")


def train(labels: Path, spec: dict, arguments: TaskResTrainingArguments) -> TaskResCLIPForImageClassification:
    model = TaskResCLIPForImageClassification.from_base(demo_model(), spec["classes"], spec["template"])
    data = load_training_data(labels, class_names=spec["classes"], eval_split="none")
    TaskResTrainer(model, arguments, data.train).train()
    return model


if __name__ == "__main__":
    main()
