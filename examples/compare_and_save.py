"""Compare few-shot methods on the same draws, then save one that is not ours as an ordinary classifier.

python examples/compare_and_save.py --dataset photos --base-model openai/clip-vit-base-patch32 --method gda
"""

from __future__ import annotations

import argparse

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, load_training_data
from taskres_hf.demo import demo_dataset, demo_model
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.methods.all import METHODS
from taskres_hf.methods.saving import write_to_model
from taskres_hf.paper.compare import compare_methods
from taskres_hf.paper.comparison import accuracy_table, summarise_methods


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="Hub id, parquet folder or image folder (default: shipped pictures)")
    parser.add_argument("--base-model", default=demo_model())
    parser.add_argument("--template", default="a drawing of a {}.")
    parser.add_argument("--shots", type=int, default=4)
    parser.add_argument("--method", default="gda", help="the one to save")
    parser.add_argument("--output-dir", default="taskres-output")
    options = parser.parse_args()

    results = compare_methods(
        options.base_model, options.dataset or "people", methods=["zero-shot", options.method, "taskres"],
        shots=[options.shots], seeds=[1, 2], templates=options.template,
    )  # fmt: skip
    print(accuracy_table(summarise_methods(results), results).markdown())

    data = load_training_data(options.dataset or demo_dataset("people"))
    model = TaskResCLIPForImageClassification.from_base(options.base_model, data.train.class_names, options.template)
    features = TaskResTrainer(model).embed(data.train)
    shots = features.select(few_shot_indices(features.labels.tolist(), options.shots, seed=1, on_short="ignore"))
    fitted = METHODS[options.method]().fit(shots, model.classifier, seed=1)
    write_to_model(fitted, model, method=options.method, features=shots)  # refused, with the reason, if not linear
    model.save_pretrained(options.output_dir)
    print(f"{options.method} saved in {options.output_dir}: taskres evaluate, predict and info take it as any other.")


if __name__ == "__main__":
    main()
