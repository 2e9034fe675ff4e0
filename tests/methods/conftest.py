"""Embeddings of real pictures, as methods take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import DatasetDict

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.residual import TaskResClassifier


@pytest.fixture(scope="session")
def whole_model(base: str, spec: dict[str, Any]) -> TaskResCLIPForImageClassification:
    """A zero-shot classifier of 8 classes; do not change it."""
    return TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])


@pytest.fixture(scope="session")
def embedded(whole_model: TaskResCLIPForImageClassification, splits: DatasetDict) -> dict[str, ImageFeatures]:
    """`shots`: 5 a class but 1 of class 0 and 2 of class 1. `views`: the same in 3 views. `test`: others."""
    trainer = TaskResTrainer(whole_model, TaskResTrainingArguments(disable_tqdm=True))
    plain, views = trainer.embed(splits["train"]), trainer.embed(splits["train"], views=3)
    rows = few_shot_indices(plain.labels.tolist(), 5, 1, on_short="ignore")
    for label, most in ((0, 1), (1, 2)):
        surplus = [row for row in rows if plain.labels[row] == label][most:]
        rows = [row for row in rows if row not in surplus]
    return {"shots": plain.select(rows), "views": views.select(rows), "test": trainer.embed(splits["test"])}


@pytest.fixture
def shots(embedded: dict[str, ImageFeatures]) -> ImageFeatures:
    return embedded["shots"]


@pytest.fixture
def views(embedded: dict[str, ImageFeatures]) -> ImageFeatures:
    return embedded["views"]


@pytest.fixture
def images(embedded: dict[str, ImageFeatures]) -> torch.Tensor:
    """Embeddings of pictures to classify, raw."""
    return embedded["test"].image_embeds[0]


@pytest.fixture
def classifier(whole_model: TaskResCLIPForImageClassification) -> TaskResClassifier:
    return whole_model.classifier
