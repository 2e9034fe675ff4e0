"""`TaskResForSequenceClassification`: its artifact, what it shares with others, and what it refuses."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from support import copied, forge, random_residual
from text_models import CLASSES, tiny_text_model, tiny_tokenizer
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from taskres_hf import (
    ClassifierPool,
    TaskResCLIPForImageClassification,
    TaskResForImageClassification,
    TaskResTrainer,
    TaskResTrainingArguments,
)
from taskres_hf import TaskResForSequenceClassification as Model
from taskres_hf.analysis.learned import Learned
from taskres_hf.checking import verify
from taskres_hf.description import describe
from taskres_hf.errors import (
    ArtifactError,
    BaseMismatchError,
    ClassNamesError,
    ConfigurationError,
    DataError,
    TaskResError,
)
from taskres_hf.export import export
from taskres_hf.pool import pack
from taskres_hf.report import write_report
from taskres_hf.training import TaskResTrainingArguments as Arguments

LABELS = ("Sports", "red", "politics", "cooking")
TOKENS = dict(tiny_tokenizer()(["the goal", "bake the bread of a mayor"], padding=True, return_tensors="pt"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**TOKENS).logits
    return found


def test_whatever_loads_it_gives_this_class(saved: Path) -> None:
    model = Model.from_pretrained(saved)
    for other in (TaskResCLIPForImageClassification, AutoModelForSequenceClassification):
        again = other.from_pretrained(saved)
        assert type(again) is Model
        assert torch.equal(logits(again), logits(model))
    for other in (AutoModelForImageClassification, TaskResForImageClassification):
        with pytest.raises(ConfigurationError, match="of texts, not of pictures"):
            other.from_pretrained(saved)


def test_a_classifier_of_pictures_is_not_loaded_by_this_class(trained: Path) -> None:
    for loads in (Model, AutoModelForSequenceClassification, AutoTokenizer):
        with pytest.raises(ConfigurationError, match="of pictures"):
            loads.from_pretrained(trained)


def test_the_artifact_is_the_residual_alone(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["format_version"] == 5
    assert sorted(file.name for file in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (saved / "model.safetensors").stat().st_size < 20_000
    facts = describe(saved)
    assert facts["base_classifier"] == saved.parent.name.rstrip("0123456789")
    assert "texts" in facts["measured_on"]
    card = (saved / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert 'pipeline("text-classification"' in card
    assert "picture" not in card
    assert "image" not in card


def test_another_model_is_noticed(saved: Path) -> None:
    other = tiny_text_model("bert", LABELS)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "attention" in name:
                weight.mul_(1.5)
    other.config._name_or_path = str(json.loads((saved / "config.json").read_text())["base_model_name_or_path"])
    with pytest.raises(BaseMismatchError):
        Model.from_pretrained(saved, base_model=other)
    Model.from_pretrained(saved, base_model=other, accept_base_mismatch=True)


def test_one_tower_serves_several(saved: Path) -> None:
    model = Model.from_pretrained(saved)
    again = Model.from_pretrained(saved, base_model=model.clip)
    assert again.clip is model.clip
    assert torch.equal(logits(again), logits(model))
    other = "cls" if model.encoding.pooling == "mean" else "mean"
    with pytest.raises(ConfigurationError, match="pools by"):
        Model.from_base(model.clip, CLASSES, base_classifier="class_names", pooling=other)


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 4}, {"base_classifier": None}, {"base_classifier": "text"}, {"text_encoding": None},
        {"text_encoding": {"pooling": "mean"}}, {"residual_side": "image"},
        {"text_encoding": {"pooling": "sum", "prompt": "", "max_length": 9}},
        {"text_encoding": {"pooling": "cls", "prompt": 3, "max_length": 9}},
        {"problem_type": "multi_label_classification"},
    ],
)  # fmt: skip
def test_a_forged_config_is_refused(changes: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    folder = forge(copied(saved, tmp_path / "forged"), **changes)
    with pytest.raises((ArtifactError, ConfigurationError)):
        Model.from_pretrained(folder)


def test_a_damaged_artifact_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path / "damaged")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    for loads in (Model, AutoTokenizer):
        with pytest.raises(ArtifactError):
            loads.from_pretrained(folder)


def test_what_is_for_pictures_is_refused(saved: Path, texts: Any, tmp_path: Path) -> None:
    model = Model.from_pretrained(saved)
    asked: list[Callable[[], Any]] = [
        lambda: Model.merge_residuals([model, model]),
        lambda: Model.unite([model, model]),
        lambda: model.image_processor,
        lambda: model.get_image_features(None),
        lambda: model.save_pretrained(tmp_path / "code", include_code=True),
        lambda: Learned(model.classifier),
        lambda: write_report(model, tmp_path / "report.html"),
        lambda: export(model, tmp_path / "export"),
        lambda: pack({"one": saved}, tmp_path / "pack.safetensors"),
        lambda: ClassifierPool().add("one", saved),
        lambda: Model.from_base(model.clip, CLASSES, problem_type="multi_label_classification"),
        lambda: Model.from_base(model.clip, CLASSES, residual_side="image"),
        *[
            lambda options=options: TaskResTrainer(model, Arguments(**options), texts)
            for options in ({"views": 2}, {"augment_online": True}, {"engine": "openvino"}, {"crop": "torchvision"})
        ],
    ]
    for ask in asked:
        with pytest.raises(TaskResError):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_data_of_another_kind_is_refused(saved: Path, splits: Any, texts: Any, model: Any) -> None:
    from taskres_hf.data import LabelledImages, LabelledTexts

    arguments = TaskResTrainingArguments(disable_tqdm=True)
    with pytest.raises(DataError):
        TaskResTrainer(Model.from_pretrained(saved), arguments, LabelledImages(splits["train"])).train()
    with pytest.raises(DataError):
        TaskResTrainer(model, arguments, LabelledTexts(texts)).train()


def test_classes_are_removed_reordered_and_renamed(saved: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(saved)
    before, names = logits(model), model.class_names
    model.remove_classes([names[1]]).rename_classes({names[0]: "first"})
    model.reorder_classes([names[2], "first"])
    torch.testing.assert_close(logits(model), before[:, [2, 0]])
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(logits(Model.from_pretrained(tmp_path / "changed")), logits(model))


def test_at_strength_0_it_is_what_it_was_before_training(saved: Path) -> None:
    model = Model.from_pretrained(saved)
    model.strength = 0.0
    with torch.no_grad():
        assert torch.equal(logits(model), model.zero_shot_logits(**TOKENS))


def test_what_it_claims_can_be_checked(saved: Path, texts: Any) -> None:
    found = {row["what"]: row["result"] for row in verify(saved, texts)}
    assert set(found.values()) == {"matches"}
    assert "training texts" in found


def test_pushed_and_loaded(saved: Path, hub: HubServer) -> None:
    model = Model.from_pretrained(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.push_to_hub("tester/texts")
    again = Model.from_pretrained("tester/texts", base_model=model.clip)
    assert torch.equal(logits(again), logits(model))


def test_two_tasks_over_one_tower(text_base: Callable[..., str]) -> None:
    model = Model.from_base(text_base(), CLASSES)
    other = random_residual(Model.from_base(model.clip, ["red", "blue"]))  # type: ignore[arg-type]
    model.use_classifier(other)
    assert model.class_names == ["red", "blue"]
    pooled = Model.from_base(text_base(), ["red", "blue"], pooling="cls")
    with pytest.raises(ConfigurationError, match="text_encoding"):
        model.use_classifier(pooled)


def test_where_the_rows_come_from(text_base: Callable[..., str]) -> None:
    base = text_base("bert", LABELS)
    assert Model.from_base(base, CLASSES).config.base_classifier == "head"
    assert Model.from_base(base, CLASSES, "a {}").config.base_classifier == "class_names"
    assert Model.from_base(base, ["red", "goal"]).config.base_classifier == "class_names"
    named = Model.from_base(base, ["red", "goal"], base_classifier="head", prompt_names={"goal": "Sports"})
    assert named.config.prompt_names == {"goal": "Sports"}
    with pytest.raises(ClassNamesError, match="no label 'goal'"):
        Model.from_base(base, ["red", "goal"], base_classifier="head")
    with pytest.raises(ConfigurationError, match="has none"):
        Model.from_base(text_base(), CLASSES, base_classifier="head")


def test_pipeline_names_the_way_out_of_long_texts(saved: Path) -> None:
    classify = pipeline("text-classification", model=str(saved))
    with pytest.raises(ConfigurationError, match="truncation=True"):
        classify("goal " * 99)
    assert classify("goal " * 99, truncation=True)[0]["label"] in CLASSES


@pytest.mark.parametrize("recipe", ["auto", "auto-v1", "paper"])
@pytest.mark.parametrize("rows", ["class_names", "head", "class_means"])
def test_every_recipe_over_every_kind_of_rows(
    recipe: Any, rows: str, text_base: Callable[..., str], texts: Any
) -> None:
    model = Model.from_base(text_base("bert", LABELS), CLASSES, base_classifier=rows)
    TaskResTrainer(model, TaskResTrainingArguments(recipe=recipe, disable_tqdm=True), texts).train()
    tokens = model.tokenizer(list(texts["sentence"]), padding=True, return_tensors="pt")
    with torch.no_grad():
        right = model(**tokens).logits.argmax(1) == torch.tensor(texts["label"])
    assert not model.classifier.is_zero_shot
    assert recipe != "auto" or float(right.float().mean()) > 0.8
