"""Embeddings that tests of training share."""

from __future__ import annotations

import pytest

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset, demo_model, demo_tasks
from taskres_hf.embedding.features import ImageFeatures


@pytest.fixture(scope="module")
def tasks() -> dict[str, tuple[Model, dict[str, ImageFeatures]]]:
    """Real embeddings [N, 192] of three shipped tasks."""
    found = {}
    for name in ("animals-plants", "food", "people"):
        spec, splits = demo_tasks()[name], demo_dataset(name)
        model = Model.from_base(demo_model(), spec["classes"], spec["template"])
        trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
        found[name] = (model, {part: trainer.embed(splits[part]) for part in ("train", "test")})
    return found
