"""Picture files by several classifiers: rows as they come, and one table of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..predicting import Pictures, PredictionWriter, WrittenPredictions
from ..prediction_files import check_output, csv_separator
from ..storage import digest_of
from .stacked import PoolView


def by_picture(view: PoolView, embeds: Tensor, names: Sequence[str] | None, top_k: int | None) -> list[dict[str, Any]]:
    """Labels and scores of each picture by name, of embeddings [N, D]."""
    found = {name: view.predictions(name, rows, top_k) for name, rows in view.logits(embeds, names).items()}
    return [{name: answers[place] for name, answers in found.items()} for place in range(len(embeds))]


def by_file(
    view: PoolView,
    items: Pictures,
    names: Sequence[str] | None,
    top_k: int | None,
    size: int,
    done: int = 0,
    progress: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows of files from number `done` on."""
    count = len(items.paths)
    batches = [range(start, min(start + size, count)) for start in range(done, count, size)]
    with tqdm(total=count, initial=done, desc=items.what, unit=items.unit, disable=not progress) as bar:
        for places, embeds in items.embedder.stream(batches, items.load, augmented=False):
            finite = embeds.isfinite().all(dim=1) if embeds is not None else torch.zeros(0)
            rows = [] if embeds is None else by_picture(view, embeds.nan_to_num(0.0, 0.0, 0.0), names, top_k)
            answers = iter(zip(finite.tolist(), rows, strict=True))
            for place in places:
                problem = items.errors.pop(place, None)
                usable, found = next(answers) if problem is None else (True, {})
                if not usable:
                    problem, found = f"{items.called(place)} has no scores: the model gives NaN for it.", {}
                yield {"file": items.cell(place), "classifiers": found, "error": problem}
            bar.update(len(places))
    items.finish()


def to_file(
    view: PoolView,
    items: Pictures,
    output: Path,
    names: Sequence[str] | None,
    top_k: int | None,
    batch_size: int | None,
    *,
    resume: bool,
    progress: bool,
) -> WrittenPredictions:
    """The work of `ClassifierPool.classify_to_file`."""
    check_output(output)
    chosen, embedder = view.chosen(names), items.embedder
    labels = [one.class_names for one in chosen.values()]
    several = top_k is None and any(one.several_labels for one in chosen.values())
    separator = csv_separator([label for each in labels for label in each], output) if several else None
    most = 0 if several else min(top_k or 1, max(map(len, labels), default=1))
    size = batch_size or embedder.batch_size
    embedder.get_ready(0 if resume else len(items.paths))  # as for one classifier
    run = {
        **items.identity(), "classifiers": view.digest(names), "top_k": most, "batch_size": size,
        "base model or engine": digest_of([json.dumps([*embedder.key, embedder.engine.is_stock]).encode()]),
    }  # fmt: skip
    with PredictionWriter(output, run, resume=resume, batch_size=size) as writer:
        done = writer.rows
        for row in by_file(view, items, names, top_k, size, done, progress):
            writer.write(row)
        skipped = writer.finish(
            most, separator=separator, columns=("file", "classifier"),
            spread=lambda row: [
                {"file": row["file"], "classifier": name, "predictions": row["classifiers"].get(name, []),
                 "error": row["error"]}
                for name in chosen
            ],
        )  # fmt: skip
    return WrittenPredictions(output, len(items.paths) - len(skipped), skipped, done)
