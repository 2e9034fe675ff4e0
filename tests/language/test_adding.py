"""Classes added by name to classifiers of texts, and names exchanged with their embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from text_models import CLASSES, TEXTS

from taskres_hf import TaskResForSequenceClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.cli.app import main
from taskres_hf.errors import ConfigurationError, DataError

NEW = ["red", "blue"]


def rows(names: list[str], of: dict[str, list[str]]) -> Dataset:
    columns = {
        "text": [text for name in names for text in of[name]],
        "label": [names.index(name) for name in names for _ in of[name]],
    }
    return Dataset.from_dict(columns, Features({"text": Value("string"), "label": ClassLabel(names=names)}))


MORE = {"red": ["the red ball", "a red law", "red soup"], "blue": ["the blue ball", "a blue law", "blue soup"]}


@pytest.fixture
def model(text_base: Callable[..., str]) -> TaskResForSequenceClassification:
    made = TaskResForSequenceClassification.from_base(text_base("bert"), CLASSES)
    TaskResTrainer(made, TaskResTrainingArguments(shots=4, disable_tqdm=True), rows(CLASSES, TEXTS)).train()
    return made


def logits(model: TaskResForSequenceClassification) -> torch.Tensor:
    with torch.no_grad():
        return model(**dict(model.tokenizer(["the goal", "a red soup"], padding=True, return_tensors="pt"))).logits


def test_old_answers_stay_and_new_classes_answer_by_name(
    model: TaskResForSequenceClassification, tmp_path: Path, text_base: Callable[..., str]
) -> None:
    before = logits(model)
    model.add_classes(NEW)
    assert model.class_names == [*CLASSES, *NEW]
    torch.testing.assert_close(logits(model)[:, :3], before, atol=1e-4, rtol=1e-5)
    zero_shot = TaskResForSequenceClassification.from_base(text_base("bert"), [*CLASSES, *NEW])
    torch.testing.assert_close(model.classifier.base, zero_shot.classifier.base, atol=1e-5, rtol=1e-5)
    after = logits(model)
    model.save_pretrained(tmp_path)
    again = TaskResForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again), after)


def test_from_texts_of_the_new_classes_and_of_all(model: TaskResForSequenceClassification) -> None:
    before = logits(model)
    model.add_classes(NEW, dataset=rows(NEW, MORE))
    torch.testing.assert_close(logits(model)[:, :3], before, atol=1e-4, rtol=1e-5)
    assert model.config.training["changes"][-1]["from"] == "pictures"
    named = list(model.class_names)
    model.remove_classes(NEW)
    model.add_classes(NEW, dataset=rows(named, TEXTS | MORE))
    assert float((logits(model)[:, :3] - before).abs().max()) > 1e-3
    with pytest.raises(DataError, match="no text"):
        model.add_classes(["salt", "law"], dataset=rows(["salt", "law"], {"salt": ["salt"], "law": []}))


def test_a_name_is_exchanged_with_its_embedding(
    model: TaskResForSequenceClassification, text_base: Callable[..., str]
) -> None:
    model.rename_classes({"sports": "match"}, reembed=True)
    names = [*CLASSES[:2], "match"]
    zero_shot = TaskResForSequenceClassification.from_base(text_base("bert"), names)
    torch.testing.assert_close(model.classifier.base, zero_shot.classifier.base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["head", "class_means"])
def test_rows_that_no_name_gives_are_refused(kind: str, text_base: Callable[..., str]) -> None:
    base = text_base("bert", ("Sports", "red", "politics", "cooking"))
    made = TaskResForSequenceClassification.from_base(base, CLASSES, base_classifier=kind)
    if kind == "class_means":
        TaskResTrainer(made, TaskResTrainingArguments(disable_tqdm=True), rows(CLASSES, TEXTS)).train()
    for change in (lambda: made.add_classes(NEW), lambda: made.rename_classes({"sports": "match"}, reembed=True)):
        with pytest.raises(ConfigurationError, match="pretrained head, or class means"):
            change()
    assert made.class_names == CLASSES


def test_on_the_command_line(model: TaskResForSequenceClassification, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "old")
    table = tmp_path / "named.csv"
    lines = [f"{text},{name}" for name in NEW for text in MORE[name]]
    table.write_text("\n".join(["text,label", *lines]))
    for more in ([], ["--dataset", str(table)]):
        out = tmp_path / f"new{len(more)}"
        with pytest.raises(SystemExit) as stop:
            main(["classes", str(tmp_path / "old"), "--add", "red", "--add", "blue", "-o", str(out), "-q", *more])
        assert not stop.value.code
        assert TaskResForSequenceClassification.from_pretrained(out).class_names == [*CLASSES, *NEW]
