"""What `benchmarks.difficulty` looks at: measures of each task and of each class, and what training reached."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.analysis import difficulty as measures
from taskres_hf.analysis import transfer
from taskres_hf.base_classifier import base_embeddings
from taskres_hf.demo import demo_model
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.prompts import named_templates
from taskres_hf.training.whitened import fit_whitened

from . import options as opt
from .photos import photo_model_path
from .tasks import Task, described, tasks

Record = dict[str, Any]
Array = NDArray[np.float64]

# ---------------------------------------------------------------------- what is measured and what is reached


def _only(embeds: Tensor, labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pictures of some classes, which become 0, 1, ..."""
    place = {old: new for new, old in enumerate(classes)}
    keep = [row for row, label in enumerate(labels.tolist()) if label in place]
    return embeds[keep], torch.tensor([place[label] for label in labels[keep].tolist()])


def _by_class(hits: Tensor, labels: Tensor, classes: int) -> list[float]:
    return [float(hits[labels == number].mean()) for number in range(classes)]


def records(
    about: Mapping[str, Any], task: Task, prompts: Tensor, shots: Sequence[int], seeds: Sequence[int], subsets: int
) -> Iterator[Record]:
    """One dict a draw: what was measured, without labels and with, and what recipe `auto` reached.

    Args:
        about: `kind`, `task` and `base`. prompts: [P, K, D], base classifiers of other templates.
    """
    scale, total = task.head.logit_scale, len(task.head.base)
    draw = random.Random(f"{about['kind']} {about['task']}")
    parts = [list(range(total))]
    parts += [sorted(draw.sample(range(total), draw.randint(4, min(20, total - 1)))) for _ in range(subsets)]
    for number, classes in enumerate(parts):
        f, y = _only(task.train.image_embeds[0], task.train.labels, classes)
        g, truth = _only(task.test.image_embeds[0], task.test.labels, classes)
        base, other = task.head.base[classes], prompts[:, classes]
        zero = (measures.zero_shot(g, base, scale).argmax(1) == truth).double()
        unlabelled = measures.task_measures(f, base, scale, prompts=other)
        of_classes = measures.class_measures(f, base, scale)
        for count in shots:
            for seed in seeds if number == 0 else [seeds[(number - 1) % len(seeds)]]:
                rows = few_shot_indices(y.tolist(), count, seed, on_short="ignore")
                fit = fit_whitened(f[rows], y[rows], base, scale)
                hits = ((F.normalize(g.double(), dim=1) @ fit.weight.T + fit.bias).argmax(1) == truth).double()
                record: Record = {
                    **about, "subset": number, "classes": len(classes), "shots": count, "seed": seed,
                    "accuracy": float(hits.mean()), "zero_shot": float(zero.mean()), transfer.UNLABELLED: unlabelled,
                    "labelled": measures.task_measures(f[rows], base, scale, y[rows], other),
                }  # fmt: skip
                if number == 0:
                    labelled = measures.class_measures(f[rows], base, scale, y[rows])
                    record["by_class"] = {
                        "accuracy": _by_class(hits, truth, total), "zero_shot": _by_class(zero, truth, total),
                        transfer.UNLABELLED: {name: values.tolist() for name, values in of_classes.items()},
                        "labelled": {name: values.tolist() for name, values in labelled.items()},
                    }  # fmt: skip
                yield record


def _prompts(path: str, classes: Sequence[str]) -> Tensor:
    """Base classifiers [P, K, D] of CLIP's seven templates."""
    model = TaskResCLIPForImageClassification.from_base(path, ["one", "two"], "{}")
    return torch.stack([
        base_embeddings(model.clip, model.tokenizer, [[template.format(name)] for name in classes])
        for template in named_templates()["clip-7"]
    ])  # fmt: skip


def all_records(options: argparse.Namespace) -> list[Record]:
    """Of every task by both base models; those finished in `--output-dir` are read."""
    found: list[Record] = []
    for swap in (False, True):
        for kind in (opt.PHOTOGRAPHS, opt.EMOJI):
            base = opt.EMOJI if (kind == opt.EMOJI) != swap else opt.PHOTOGRAPHS
            opened: dict[str, Task] = {}
            for name, spec, _, _ in described(kind):
                settings = {"shots": options.shots, "seeds": options.seeds, "subsets": options.subsets}
                path = None if options.output_dir is None else options.output_dir / f"{base}-{kind}-{name}.json"
                if path is not None and path.exists():
                    stored = json.loads(path.read_text())
                    if stored["settings"] != settings:
                        raise SystemExit(f"{path} is of {stored['settings']}: take another folder.")
                    found += stored["records"]
                    continue
                opened = opened or tasks(kind, swap)
                about = {"kind": kind, "task": name, "base": base}
                other = _prompts(demo_model() if base == opt.EMOJI else photo_model_path(), spec["classes"])
                made = list(records(about, opened[name], other, **settings))
                found += made
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps({"settings": settings, "records": made}))
    return found


# ---------------------------------------------------------------------- lines, each on other tasks than it predicts


class Row(NamedTuple):
    """Values to predict from, and what was reached; `task`, `kind` and `base` are left out together."""

    task: str
    kind: str
    base: str
    shots: int
    values: Mapping[str, float]
    accuracy: float
    gain: float


def _key(record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("base", "kind", "task", "subset", "seed"))


def _pairs(found: Sequence[Record], mode: str) -> Iterator[tuple[Record, Record, str, int]]:
    """What was measured and what was reached, from the same draw; with labels at every number of shots."""
    reached: dict[tuple[Any, ...], list[Record]] = {}
    for record in found:
        reached.setdefault(_key(record), []).append(record)
    for record in found:
        if mode == transfer.UNLABELLED:
            yield record, record, mode, 0
        elif (record["shots"] == 1) == (mode == transfer.ONE):
            for other in reached[_key(record)]:
                yield record, other, "labelled", record["shots"]


def task_rows(found: Sequence[Record], mode: str) -> list[Row]:
    made = []
    for record, other, which, given in _pairs(found, mode):
        values = transfer.task_values(record[which], record["classes"], given)
        values["log_shots"] = float(np.log2(other["shots"]))
        if given:  # relative transfer difficulty as published: what chance would reach over what zero-shot does
            values["rtd"] = 1.0 / max(record["classes"] * record[which]["zero_shot_accuracy"], 0.5)
        place = (f"{record['kind']}: {record['task']}", record["kind"], record["base"], other["shots"])
        made.append(Row(*place, values, other["accuracy"], other["accuracy"] - other["zero_shot"]))
    return made


def class_rows(found: Sequence[Record], mode: str) -> list[Row]:
    made = []
    for record, other, which, given in _pairs([record for record in found if record["subset"] == 0], mode):
        own = {name: torch.tensor(values) for name, values in record["by_class"][which].items()}
        of_task = transfer.task_values({}, record["classes"], given)
        place = (f"{record['kind']}: {record['task']}", record["kind"], record["base"], other["shots"])
        told, before = other["by_class"]["accuracy"], other["by_class"]["zero_shot"]
        for values, share, zero in zip(transfer.class_values(own, of_task), told, before, strict=True):
            values["log_shots"] = float(np.log2(other["shots"]))
            made.append(Row(*place, values, share, share - zero))
    return made
