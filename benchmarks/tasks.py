"""The photographs and the shipped emoji as embedded tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.embedding import ImageFeatures
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.residual import TaskResClassifier

from . import options as opt
from .photos import photo_dataset, photo_model_path, photo_tasks


class Task(NamedTuple):
    head: TaskResClassifier
    train: ImageFeatures
    test: ImageFeatures


def described(kind: str) -> Iterator[tuple[str, Mapping[str, Any], str, Any]]:
    """Name, classes and template, base model, and splits of each task of a kind (`options.PHOTOGRAPHS` or `EMOJI`)."""
    for name, spec in (photo_tasks() if kind == opt.PHOTOGRAPHS else demo_tasks()).items():
        if kind == opt.PHOTOGRAPHS:
            yield name, spec, photo_model_path(), photo_dataset(name)
        else:
            yield name, spec, demo_model(), demo_dataset(name)


def tasks(kind: str, swap: bool = False) -> dict[str, Task]:
    """Zero-shot classifier and embedded splits of each task.

    Args:
        swap: by the base model of the other kind; minutes where its embeddings are not cached.
    """
    found = {}
    for name, spec, own, splits in described(kind):
        base = (demo_model() if kind == opt.PHOTOGRAPHS else photo_model_path()) if swap else own
        model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
        trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
        found[name] = Task(model.classifier, trainer.embed(splits["train"]), trainer.embed(splits["test"]))
    return found


def draws(task: Task, shots: int, seeds: Sequence[int]) -> Iterator[list[int]]:
    """Rows of the training pictures that each seed draws."""
    for seed in seeds:
        yield few_shot_indices(task.train.labels.tolist(), shots, seed, on_short="ignore")
