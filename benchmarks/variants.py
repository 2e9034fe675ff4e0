"""`python -m benchmarks.variants`: views, ensembles of prompts and class descriptions under recipe `auto`.

On the photographs (see `benchmarks.photos`) and the shipped emoji, the template of the task and the plain picture
where nothing else is said; nothing here is used to choose anything. Only drawn pictures are embedded in views, which
takes more than half an hour on a busy core; with TASKRES_CACHE set, a second run takes them from there.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import mean
from typing import Any, NamedTuple
from unittest import mock

import PIL.Image
import torch
from datasets import Dataset
from PIL import ImageOps
from torch import Tensor

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding import preprocessing
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.tables import Table
from taskres_hf.training.whitened import fit_whitened

from . import options as opt
from .descriptions import DESCRIPTIONS
from .tasks import described

PLAIN = "plain"
FLIP = "plain and flipped"
PUBLISHED = "4 views as published (crops of 8 to 100 %, flips)"
MILD = "plain and 3 mild views (crops of 50 to 100 %, flips)"
ENSEMBLE = "7 templates of CLIP's"
DESCRIBED = "two descriptions a class"
_MILD = (0.5, 1.0)


class Measured(NamedTuple):
    """A task, embedded: views [V, N, D] of the drawn pictures and base classifiers by variant, and the test split.

    Attributes:
        rows: N rows of the training split, those that any draw has.
    """

    views: dict[str, Tensor]
    bases: dict[str, Tensor]
    logit_scale: float
    rows: list[int]
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def _flipped(picture: PIL.Image.Image, size: tuple[int, int], view: int) -> PIL.Image.Image:
    return ImageOps.mirror(picture)


def _mildly_cropped(picture: PIL.Image.Image, size: tuple[int, int], view: int) -> PIL.Image.Image:
    with mock.patch.object(preprocessing, "_CROP_AREA", _MILD):
        return preprocessing.augment(picture, size, random.Random(f"{view} {zlib.crc32(picture.tobytes())}"))


def _changed(pictures: Dataset, change: Callable[[PIL.Image.Image], PIL.Image.Image]) -> Dataset:
    """The same pictures, each changed when it is read."""

    def transform(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {**batch, "image": [change(picture.convert("RGB")) for picture in batch["image"]]}

    return pictures.select_columns(["image", "label"]).with_transform(transform)


def measured(name: str, spec: Mapping[str, Any], base: str, splits: Any, draws: Sequence[tuple[int, int]]) -> Measured:
    """All that the variants need of a task; `draws` are shots and seeds."""
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
    labels = list(splits["train"]["label"])
    drawn = {row for shots, seed in draws for row in few_shot_indices(labels, shots, seed, on_short="ignore")}
    rows = sorted(drawn)
    pictures, size = splits["train"].select(rows), preprocessing.crop_size(model.image_processor)

    def also(change: Callable[..., PIL.Image.Image], count: int) -> Tensor:
        changes = [partial(change, size=size, view=view) for view in range(count)]
        return torch.cat([plain, *(trainer.embed(_changed(pictures, one)).image_embeds for one in changes)])

    plain = trainer.embed(pictures).image_embeds
    views = {
        PLAIN: plain, FLIP: also(_flipped, 1), PUBLISHED: trainer.embed(pictures, views=4).image_embeds,
        MILD: also(_mildly_cropped, 3),
    }  # fmt: skip
    bases = {PLAIN: model.classifier.base}
    prompted: dict[str, dict[str, Any]] = {ENSEMBLE: {"templates": "clip-7"}}
    if name in DESCRIPTIONS:
        prompted[DESCRIBED] = {"templates": spec["template"], "class_descriptions": DESCRIPTIONS[name]}
    for variant, prompts in prompted.items():
        other = TaskResCLIPForImageClassification.from_base(base, spec["classes"], **prompts)
        bases[variant] = other.classifier.base
    test = trainer.embed(splits["test"])
    images = torch.nn.functional.normalize(test.image_embeds[0].double(), dim=1)
    return Measured(views, bases, model.classifier.logit_scale, rows, torch.tensor(labels), images, test.labels)


def score(task: Measured, variant: str, shots: int, seed: int) -> float:
    """Accuracy of recipe `auto` on the test split, in percent."""
    drawn = few_shot_indices(task.train_labels.tolist(), shots, seed, on_short="ignore")
    embeds = task.views.get(variant, task.views[PLAIN])[:, [task.rows.index(row) for row in drawn]]
    labels, base = task.train_labels[drawn].repeat(len(embeds)), task.bases.get(variant, task.bases[PLAIN])
    fitted = fit_whitened(embeds.flatten(0, 1), labels, base, task.logit_scale, len(embeds))
    return 100.0 * float(((task.test @ fitted.weight.T + fitted.bias).argmax(1) == task.test_labels).double().mean())


def tables(tasks: Mapping[str, Measured], options: Any, kind: str) -> Iterator[Table]:
    """Mean accuracy of each variant, over all tasks and, where not all have descriptions, over those that have."""
    columns = ["", *(f"{count} shot{'s' * (count > 1)}" for count in options.shots)]
    with_descriptions = {name: task for name, task in tasks.items() if DESCRIBED in task.bases}
    for found, variants in (
        (tasks, [PLAIN, FLIP, PUBLISHED, MILD, ENSEMBLE]),
        (with_descriptions, [PLAIN, ENSEMBLE, DESCRIBED]),
    ):
        rows = [
            [variant, *(
                f"{mean(score(task, variant, count, seed) for task in found.values() for seed in options.seeds):.1f}"
                for count in options.shots
            )]
            for variant in variants
        ] if found else []  # fmt: skip
        over = f"mean over {', '.join(found)} and {len(options.seeds)} seeds, {kind}"
        if rows:
            yield Table(columns, rows, f"Accuracy on the test split in percent, {over}")


def main() -> None:
    options = opt.read(opt.parser(__doc__, seeds=3))
    draws = [(shots, seed) for shots in options.shots for seed in options.seeds]
    for kind in opt.kinds(options):
        found = {name: measured(name, spec, base, splits, draws) for name, spec, base, splits in described(kind)}
        for table in tables(found, options, kind):
            print(table.markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
