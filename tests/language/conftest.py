"""Random models of texts, and a data set of three classes."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from text_models import CLASSES, TEXTS
from text_models import text_base as text_base

from taskres_hf import TaskResForSequenceClassification, TaskResTrainer, TaskResTrainingArguments

ROWS = [(text, name) for name, texts in TEXTS.items() for text in texts]


@pytest.fixture(scope="session")
def texts() -> Dataset:
    columns = {"sentence": [text for text, _ in ROWS], "label": [CLASSES.index(name) for _, name in ROWS]}
    return Dataset.from_dict(columns, Features({"sentence": Value("string"), "label": ClassLabel(names=CLASSES)}))


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texts.csv."""
    path: Path = tmp_path_factory.mktemp("table") / "texts.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *ROWS])
    return path


@pytest.fixture(scope="session", params=["class_names", "head", "class_means"])
def saved(
    request: pytest.FixtureRequest, text_base: Callable[..., str], texts: Dataset,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A trained classifier over each kind of rows; do not change it."""
    base = text_base("bert", ("Sports", "red", "politics", "cooking"))
    model = TaskResForSequenceClassification.from_base(base, CLASSES, base_classifier=request.param)
    arguments = TaskResTrainingArguments(shots=4, disable_tqdm=True, reject=0.2)
    trainer = TaskResTrainer(model, arguments, texts)
    trainer.train()
    trainer.measure(folds=2)
    folder: Path = tmp_path_factory.mktemp(request.param) / "saved"
    model.save_pretrained(folder)
    return folder
