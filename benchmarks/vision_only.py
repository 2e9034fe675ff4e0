"""`python -m benchmarks.vision_only`: residuals over an image tower alone, against a linear probe on its embeddings.

The tower is that of the dual encoder of the other tables, saved as a model of its own (an EfficientNet for the
photographs, a CLIP vision model for the emoji): no text, and embeddings before the dual encoder's projection. Above are
rows that know nothing before the shots (`class_means`); a linear probe on the same embeddings, of unit length, with C
by cross-validation on the shots; and the class means themselves. Below is a pretrained head: the dual encoder's text
rows, taken back through its projection and divided by the mean length of the projected training embeddings, so that
over raw embeddings they nearly answer as zero-shot does; and beside it recipe `auto` over the dual encoder with text.

Accuracy in percent, mean over tasks and draws; in brackets what it is above the linear probe, the 95 % interval from
10,000 draws of tasks.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel

from taskres_hf import TaskResForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding import ImageFeatures
from taskres_hf.encoders import BaseSource, load_image_processor
from taskres_hf.methods.linear_probe import LinearProbeCV
from taskres_hf.residual import TaskResClassifier
from taskres_hf.tables import Table
from taskres_hf.training.recipes import recipe_for
from taskres_hf.training.steps import fit
from taskres_hf.vision.linear_head import LinearHead

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


def projected_head(base: str, task: Task, train: ImageFeatures) -> LinearHead:
    """The text rows of a dual encoder as a head over raw embeddings of its tower."""
    clip: Any = AutoModel.from_pretrained(base, dtype=torch.float32)
    projection = clip.visual_projection.weight.detach()
    length = (train.image_embeds[0] @ projection.T).norm(dim=1).mean()
    return LinearHead(task.head.logit_scale / length * F.normalize(task.head.base, dim=1) @ projection)


def trained(head: TaskResClassifier, shots: ImageFeatures, recipe: str) -> TaskResClassifier:
    apart, args = copy.deepcopy(head), TaskResTrainingArguments(recipe=recipe, disable_tqdm=True)
    fit(apart, shots, recipe_for(args, apart, shots.labels, False), seed=1)
    return apart


def measured(task: Task, head: LinearHead, train: ImageFeatures, test: ImageFeatures, rows: list[int]) -> Any:
    """Method to accuracy."""
    shots, classes, truth = train.select(rows), len(task.head.base), test.labels
    empty = LinearHead(torch.zeros(classes, train.image_embeds.shape[2]), 0.5, 10.0)
    probe = LinearProbeCV().fit(shots, TaskResClassifier(torch.ones(classes, empty.base.shape[1])))
    means = copy.deepcopy(empty)
    means.start_from_means(shots.image_embeds[0], shots.labels)
    answers: dict[str, Callable[[Tensor], Tensor]] = {PROBE: probe.logits, "class means": means}
    answers |= {f"{recipe}, no head": trained(empty, shots, recipe) for recipe in RECIPES}
    answers["head, not trained"] = head
    answers |= {f"{recipe}, on a head": trained(head, shots, recipe) for recipe in RECIPES}
    found = {name: share(answer(test.image_embeds[0]), truth) for name, answer in answers.items()}
    clip = trained(task.head, task.train.select(rows), "auto")
    return found | {"auto, over the dual encoder with text": share(clip(task.test.image_embeds[0]), task.test.labels)}


def share(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).float().mean())


def shown(values: Mapping[str, list[float]], probe: Mapping[str, list[float]], name: str) -> str:
    """The mean, and its gap to the probe with an interval over tasks."""
    mean = 100 * np.mean([np.mean(one) for one in values.values()])
    if name == PROBE:
        return f"{mean:.1f}"
    gaps = 100 * np.array([np.mean(values[task]) - np.mean(probe[task]) for task in values])
    drawn = np.random.default_rng(1).choice(gaps, (10_000, len(gaps))).mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{mean:.1f} ({gaps.mean():+.1f}; {low:+.1f} to {high:+.1f})"


def main() -> None:
    options = opt.read(opt.parser(__doc__, seeds=3, shots=(1, 4, 16)))
    warnings.simplefilter("ignore")
    for kind in opt.kinds(options):
        found: dict[str, dict[int, dict[str, list[float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(list))
        )
        with tempfile.TemporaryDirectory() as folder:
            splits = embedded(kind, folder)
        bases = {name: base for name, _, base, _ in described(kind)}
        for name, task in tasks(kind).items():
            train, test = splits[name]
            assert train.digests == task.train.digests
            head = projected_head(bases[name], task, train)
            for shots in options.shots:
                for rows in draws(task, shots, options.seeds):
                    for method, accuracy in measured(task, head, train, test, rows).items():
                        found[method][shots][name].append(accuracy)
        columns = ["method", *(f"{shots} a class" for shots in options.shots)]
        lines = [
            [method, *(shown(by[shots], found[PROBE][shots], method) for shots in options.shots)]
            for method, by in found.items()
        ]
        title = f"{len(splits)} tasks of {kind}, {len(options.seeds)} draws each"
        print(Table(columns, lines, title).markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
