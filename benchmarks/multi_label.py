"""`python -m benchmarks.multi_label`: several labels per picture by recipe `auto`, zero-shot and logistic regression.

The pictures are composites: two or three pictures of a task, of different classes, pasted by rule into the quarters of
one canvas; those to train on are made of the training split alone, those to measure on of the test split. Emoji are the
shipped ones, photographs those of `benchmarks.photos`. Logistic regression is scikit-learn's with its usual strength
(C = 1), one class against the rest, on embeddings of unit length, and of that length times the logit scale. It gives
labels from 0.5 on, zero-shot those more likely than by chance (`multi_label_log_odds`), ours those from the threshold
on that it found on the shots. Nothing is kept of the composites.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import mean
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image, List
from torch import Tensor

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding import ImageFeatures
from taskres_hf.evaluation import multi_label_log_odds, multi_label_metrics
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.tables import Table
from taskres_hf.training.multi_label import fit_multi_label

from . import options as opt
from .tasks import described

_SIDE = 96  # pixels of a quarter
_TASKS = ("animals-plants", "food", "objects", "clothing", "fruit")
_METRICS = {"map": "mAP", "micro_f1": "micro-F1", "macro_f1": "macro-F1"}
ZERO_SHOT, OURS = "zero-shot", "auto"
PROBES = {"logistic regression": False, "logistic regression, scaled": True}


def composites(split: Dataset, class_names: Sequence[str], count: int, seed: int) -> Dataset:
    """`count` canvases of two or three pictures of different classes, with their classes as a list of labels.

    Args:
        split: with the columns `image` and `label` (ids of `class_names`).
    """
    draw = random.Random(seed)
    members: dict[int, list[int]] = {}
    for row, label in enumerate(split["label"]):
        members.setdefault(label, []).append(row)
    pictures, labels = [], []
    for _ in range(count):
        chosen = draw.sample(sorted(members), min(draw.choice((2, 3)), len(members)))
        canvas = PIL.Image.new("RGB", (2 * _SIDE, 2 * _SIDE), "white")
        for label, quarter in zip(chosen, draw.sample(range(4), len(chosen)), strict=True):
            picture = split[draw.choice(members[label])]["image"].convert("RGB")
            part = picture.resize((_SIDE, _SIDE), PIL.Image.Resampling.BICUBIC)
            canvas.paste(part, (_SIDE * (quarter % 2), _SIDE * (quarter // 2)))
        pictures.append(canvas)
        labels.append(sorted(chosen))
    features = Features({"image": Image(), "labels": List(ClassLabel(names=list(class_names)))})
    return Dataset.from_dict({"image": pictures, "labels": labels}, features)


def _embedded(model: TaskResCLIPForImageClassification, split: Dataset, count: int, seed: int) -> ImageFeatures:
    made = composites(split, model.class_names, count, seed)
    return TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True)).embed(made)


def logistic_regression(images: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Logits [M, K] of one class against the rest; a class on all or none of the pictures is always or never given."""
    from sklearn.linear_model import LogisticRegression

    columns = []
    for truth in labels.T:
        if bool(truth.all()) or not bool(truth.any()):
            columns.append(torch.full((len(test),), 1.0 if bool(truth.all()) else -1.0, dtype=torch.float64))
            continue
        probe = LogisticRegression(max_iter=1000).fit(images.numpy(), truth.numpy())
        columns.append(torch.from_numpy(probe.decision_function(test.numpy())).double())
    return torch.stack(columns, dim=1)


def measured(train: ImageFeatures, test: ImageFeatures, base: Tensor, scale: float, shots: int, seed: int) -> Any:
    """Metrics by method."""
    rows = few_shot_indices(train.labels.tolist(), shots, seed, on_short="ignore")
    images, unseen = (F.normalize(part.image_embeds[0], dim=1) for part in (train.select(rows), test))
    labels = train.labels[rows]
    fitted = fit_multi_label(images, labels, base, scale)
    logits = unseen.double() @ fitted.weight.T + fitted.bias
    found = {OURS: multi_label_metrics(logits, test.labels, threshold=fitted.chosen["threshold"])}
    before = multi_label_log_odds(scale * unseen @ F.normalize(base, dim=1).T)
    found[ZERO_SHOT] = multi_label_metrics(before, test.labels)
    for name, scaled in PROBES.items():
        factor = scale if scaled else 1.0
        found[name] = multi_label_metrics(logistic_regression(factor * images, labels, factor * unseen), test.labels)
    return found


def main() -> None:
    made = opt.parser(__doc__, seeds=3, shots=(1, 4, 16))
    made.add_argument("--count", type=int, default=300, help="composites to draw from, and to measure on (default 300)")
    options = opt.read(made)
    for kind in opt.kinds(options):
        rows = []
        for name, spec, base, splits in described(kind):
            if name not in _TASKS:
                continue
            model = TaskResCLIPForImageClassification.from_base(
                base, spec["classes"], spec["template"], problem_type="multi_label_classification"
            )
            train, test = (
                _embedded(model, splits[part], options.count, seed) for part, seed in (("train", 1), ("test", 2))
            )
            head = model.classifier
            for shots in options.shots:
                found = [measured(train, test, head.base, head.logit_scale, shots, seed) for seed in options.seeds]
                for method in (ZERO_SHOT, *PROBES, OURS):
                    values = [f"{100 * mean(one[method][key] for one in found):.1f}" for key in _METRICS]
                    rows.append([name, shots, method, *values])
        print(Table(["task", "shots", "method", *_METRICS.values()], rows).markdown(), flush=True)
        print()


if __name__ == "__main__":
    main()
