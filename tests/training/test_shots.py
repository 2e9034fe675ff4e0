"""Which pictures a run learns from: draws, pictures that cannot be read, pictures under two labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.embedding.stored import StoredFeatures
from taskres_hf.errors import ConfigurationError, DataError, FewShotError
from taskres_hf.training import recipes
from taskres_hf.training import shots as shots_module

BROKEN = {"bytes": b"no picture", "path": "broken.png"}


def _arguments(**options: Any) -> TaskResTrainingArguments:
    quick = {"disable_tqdm": True, "on_short": "ignore", "num_train_epochs": 2, "cache_dir": False}
    return TaskResTrainingArguments(**{**quick, **options})


def _with(dataset: Dataset, cells: dict[int, Any], labels: dict[int, int] | None = None) -> Dataset:
    """The same dataset with other pictures or labels in some rows."""
    raw = dataset.cast_column("image", Image(decode=False))
    rows = [dict(row) for row in raw.select_columns(["image", "label"])]
    for index, cell in cells.items():
        rows[index]["image"] = cell
    for index, label in (labels or {}).items():
        rows[index]["label"] = label
    features = raw.select_columns(["image", "label"]).features.copy()
    return Dataset.from_list(rows, features=features).cast_column("image", Image())


def _rows_of(dataset: Dataset, label: int) -> list[int]:
    return [row for row, value in enumerate(dataset["label"]) if value == label]


@pytest.mark.parametrize(
    "options", [{"on_short": "raise"}, {"shots": 4}, {"augment_online": True}, {"views": 1, "shots": 1}]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_skipping_the_only_picture_of_a_class_is_refused(
    model: Model, splits: DatasetDict, options: dict[str, Any]
) -> None:
    train, rows = splits["train"], _rows_of(splits["train"], 2)
    data = _with(train, {rows[0]: BROKEN}).select([n for n in range(60) if n not in rows[1:]])
    refusing = _arguments(on_error="skip", **{"on_short": "warn", **options})
    with pytest.raises(FewShotError, match=r"no training picture that can be read.*reptile or frog"):
        TaskResTrainer(model, refusing, data).train()
    TaskResTrainer(model, _arguments(on_error="skip", **{**options, "on_short": "ignore"}), data).train()


def test_a_drawn_picture_that_cannot_be_read_is_replaced(model: Model, splits: DatasetDict) -> None:
    train = splits["train"]
    TaskResTrainer(model, _arguments(shots=4), train).train()
    drawn = model.config.few_shot["indices"]
    broken = _with(train, dict.fromkeys(drawn[:2], BROKEN))
    model.classifier.reset()
    with pytest.warns(UserWarning, match="2 drawn pictures cannot be read; others of their classes"):
        TaskResTrainer(model, _arguments(shots=4, on_error="skip"), broken).train()
    few_shot = model.config.few_shot
    assert few_shot["replaced"] == 2
    assert few_shot["indices"][2:] == drawn[2:]
    assert not set(drawn[:2]) & set(few_shot["indices"])
    assert set(Counter(train["label"][row] for row in few_shot["indices"]).values()) == {4}
    assert few_shot["num_images"] == len(few_shot["indices"]) == model.config.data["train_images"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_no_other_picture_can_replace_is_counted(model: Model, splits: DatasetDict) -> None:
    rows = _rows_of(splits["train"], 0)
    keep = [n for n in range(len(splits["train"])) if n not in rows[3:]]
    data = _with(splits["train"], {rows[1]: BROKEN}).select(keep)
    TaskResTrainer(model, _arguments(shots=3, on_error="skip"), data).train()
    few_shot = model.config.few_shot
    assert few_shot["unreadable"] == 1
    assert "replaced" not in few_shot
    assert keep.index(rows[1]) not in few_shot["indices"]
    assert few_shot["num_images"] == 3 * 8 - 1
    with pytest.raises(FewShotError, match="fewer than 3"):
        TaskResTrainer(model, _arguments(shots=3, on_error="skip", on_short="raise"), data).train()


@pytest.mark.parametrize("recipe", ["auto", "paper"])
@pytest.mark.parametrize("as_embeddings", [False, True])
def test_asking_for_more_shots_than_there_are_is_asking_for_all(
    model: Model, splits: DatasetDict, recipe: str, as_embeddings: bool
) -> None:
    data: Any = splits["train"].select([row for k in range(8) for row in _rows_of(splits["train"], k)[:9]])
    data = data.shuffle(seed=0)
    assert set(Counter(data["label"]).values()) == {9}
    if as_embeddings:
        data = TaskResTrainer(model, _arguments()).embed(data)
    results = []
    for shots in (30, None):
        model.classifier.reset()
        options = {"recipe": recipe, "augment_online": False, "num_train_epochs": None}
        TaskResTrainer(model, _arguments(shots=shots, **options), data).train()
        results.append((model.classifier.residual.detach().clone(), model.config.training))
        assert model.config.few_shot.get("indices", []) == (list(range(72)) if shots else [])
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_picture_under_two_labels_is_named_and_counted(model: Model, splits: DatasetDict) -> None:
    train = splits["train"]
    raw = train.cast_column("image", Image(decode=False))
    first, other = _rows_of(train, 0)[0], _rows_of(train, 1)[0]
    cell = {"bytes": raw[first]["image"]["bytes"], "path": "cow.png"}
    data = _with(train, {first: cell, other: cell})
    names = model.class_names
    with pytest.warns(
        UserWarning, match=f"1 pictures are there under.*cow.png as '{names[0]}' and cow.png as '{names[1]}'"
    ):
        TaskResTrainer(model, _arguments(), data).train()
    assert model.config.data["conflicting_pictures"] == 1
    embedded = TaskResTrainer(model, _arguments()).embed(data)
    with pytest.warns(UserWarning, match=f"row {first} as"):
        TaskResTrainer(model, _arguments(), embedded).train()


def test_one_picture_twice_under_one_label_is_no_fault(
    model: Model, splits: DatasetDict, recwarn: pytest.WarningsRecorder
) -> None:
    rows = _rows_of(splits["train"], 0)
    raw = splits["train"].cast_column("image", Image(decode=False))
    TaskResTrainer(model, _arguments(), _with(splits["train"], {rows[1]: raw[rows[0]]["image"]})).train()
    assert "conflicting_pictures" not in model.config.data
    assert not [warning for warning in recwarn if "label" in str(warning.message)]


def test_embeddings_are_checked_as_pictures_are(model: Model, splits: DatasetDict, tmp_path: Any) -> None:
    data = TaskResTrainer(model, _arguments()).embed(splits["train"])
    one = data.select([n for n in range(len(data)) if int(data.labels[n]) != 2])
    with pytest.raises(FewShotError, match="reptile or frog"):
        TaskResTrainer(model, _arguments(on_short="warn"), one).train()
    np.save(tmp_path / "embeds.npy", one.image_embeds[0].numpy())
    stored = StoredFeatures(tmp_path / "embeds.npy", one.labels, one.class_names)
    with pytest.raises(FewShotError, match="reptile or frog"):
        TaskResTrainer(model, _arguments(on_short="warn"), stored).train()
    with pytest.raises(ConfigurationError, match="needs pictures"):
        TaskResTrainer(model, _arguments(augment_online=True), data).train()
    other = Model.from_base(model.clip, ["a", "b"], tokenizer=model.tokenizer)
    with pytest.raises(DataError, match="length 192"):
        TaskResTrainer(other, _arguments(), data).train()


def test_the_default_recipe_fits_embeddings_on_disk_as_those_in_memory(
    model: Model, splits: DatasetDict, tmp_path: Any
) -> None:
    data = TaskResTrainer(model, _arguments()).embed(splits["train"])
    stored = _store(data, tmp_path)
    classifiers = []
    for source in (data, stored):
        model.classifier.reset()
        TaskResTrainer(model, _arguments(num_train_epochs=None), source).train()
        assert model.config.training["recipe"] == "auto"
        assert model.config.data["train_images"] == len(data)
        classifiers.append(model.classifier.weight().detach())
    assert torch.equal(*classifiers)
    TaskResTrainer(model, _arguments(), stored).train()
    assert model.config.training["recipe"] == "auto-v1"


def test_of_too_many_embeddings_on_disk_a_part_is_taken_and_said(
    model: Model, splits: DatasetDict, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TaskResTrainer(model, _arguments()).embed(splits["train"])
    stored, classes = _store(data, tmp_path), len(data.class_names)
    monkeypatch.setattr(shots_module, "MOST_LOGITS", 50 * classes)
    with pytest.warns(UserWarning, match=r"takes up to 6 of a class.*auto-v1"):
        TaskResTrainer(model, _arguments(num_train_epochs=None), stored).train()
    rows = stored.spread(50)
    assert model.config.few_shot["num_images"] == model.config.data["train_images"] == len(rows) <= 50
    assert model.config.few_shot["of"] == len(data)
    weight = model.classifier.weight().detach().clone()
    digest = model.config.data["train_digest"]
    TaskResTrainer(model, _arguments(num_train_epochs=None), data.select(rows.tolist())).train()
    assert torch.equal(model.classifier.weight(), weight)
    assert digest != stored.digest
    monkeypatch.setattr(recipes, "MOST_LOGITS", classes)  # not even one picture of each class
    TaskResTrainer(model, _arguments(num_train_epochs=None), stored).train()
    assert model.config.training["recipe"] == "auto-v1"


def _store(data: ImageFeatures, folder: Path) -> StoredFeatures:
    np.save(folder / "embeds.npy", data.image_embeds[0].numpy())
    return StoredFeatures(folder / "embeds.npy", data.labels, data.class_names)


def test_the_account_and_the_split_are_recorded(model: Model, splits: DatasetDict) -> None:
    class Account:
        def as_dict(self) -> dict[str, Any]:
            return {"source": "pictures"}

    pictures = LabelledImages(splits["train"])
    pictures.account = Account()  # type: ignore[assignment]
    TaskResTrainer(model, _arguments(), pictures).train()
    assert model.config.data["account"] == {"source": "pictures"}
    assert model.config.data["split"] == "train"
