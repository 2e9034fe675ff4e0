"""Several labels per picture, from training to the served artifact: what a user relies on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForImageClassification, EvalPrediction, pipeline

from benchmarks.multi_label import composites
from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.checking.verifying import verify
from taskres_hf.data import load_training_data
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError, ConfigurationError, DataError, FewShotError
from taskres_hf.evaluation import compare_multi_label, multi_label_metrics
from taskres_hf.methods.all import METHODS
from taskres_hf.predicting import classify_files, classify_to_file
from taskres_hf.training.multi_label import fit_multi_label
from tests.support import copied, forge, run

MULTI = "multi_label_classification"


@pytest.fixture(scope="module")
def made(splits: Any, spec: dict[str, Any]) -> dict[str, Dataset]:
    """Composites of two or three pictures; the last two show nothing that is labelled."""
    found = {part: composites(splits[part], spec["classes"], 40, seed) for part, seed in (("train", 1), ("test", 2))}
    labels = [*found["train"]["labels"][:-2], [], []]
    features = found["train"].features
    found["train"] = Dataset.from_dict({"image": found["train"]["image"], "labels": labels}, features)
    return found


def _model(base: str, spec: dict[str, Any]) -> TaskResCLIPForImageClassification:
    return TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"], problem_type=MULTI)


def _trainer(base: str, spec: dict[str, Any], made: Any, **settings: Any) -> TaskResTrainer:
    arguments = TaskResTrainingArguments(disable_tqdm=True, engine="torch", precision="fp32", **settings)
    return TaskResTrainer(_model(base, spec), arguments, made["train"], made["test"])


@pytest.fixture(scope="module")
def artifact(base: str, spec: dict[str, Any], made: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by recipe `auto`, measured and saved; do not change it."""
    folder = tmp_path_factory.mktemp("multi") / "artifact"
    trainer = _trainer(base, spec, made, shots=4)
    trainer.train()
    metrics = trainer.measure()
    assert metrics["map"] > metrics["zero_shot_map"]
    assert metrics["micro_f1"] > metrics["zero_shot_micro_f1"]
    trainer.model.save_pretrained(folder, include_code=True)
    return folder


@pytest.fixture(scope="module")
def files(made: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for place in range(6):
        made["test"][place]["image"].save(folder / f"{place}.png")
    return [str(folder / f"{place}.png") for place in range(6)]


def test_the_artifact_says_what_it_is_and_loads(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    assert (config["problem_type"], config["format_version"]) == (MULTI, 3)
    assert 0 < config["training"]["threshold"] <= 0.5
    assert AutoModelForImageClassification.from_pretrained(artifact).config.problem_type == MULTI
    facts = describe(artifact)
    assert facts["problem_type"] == MULTI
    assert facts["map"] > facts["zero_shot_map"] > 0
    assert facts["accuracy"] is None
    card = (artifact / "README.md").read_text()
    assert "| mAP |" in card
    assert "average precision" in card
    assert "accuracy" not in card


def test_scores_are_those_of_the_stock_pipeline(artifact: Path, files: list[str]) -> None:
    model = TaskResCLIPForImageClassification.from_pretrained(artifact)
    stock = pipeline("image-classification", model=str(artifact), top_k=8)(files)
    for theirs, ours in zip(stock, classify_files(model, files, top_k=8), strict=True):
        assert [row["label"] for row in theirs] == [row["label"] for row in ours["predictions"]]
        scores = [row["score"] for row in theirs]
        assert scores == pytest.approx([row["score"] for row in ours["predictions"]], abs=1e-5)
        assert sum(scores) != pytest.approx(1.0, abs=1e-3)


def test_every_label_from_the_threshold_on_is_given(artifact: Path, files: list[str], tmp_path: Path) -> None:
    model = TaskResCLIPForImageClassification.from_pretrained(artifact)
    threshold = model.config.training["threshold"]
    every, given = (list(classify_files(model, files, top_k=k)) for k in (8, None))
    for one, other in zip(every, given, strict=True):
        assert other["predictions"] == [row for row in one["predictions"] if row["score"] >= threshold]
    model.config.training = {**model.config.training, "threshold": 0.999}
    classify_to_file(model, files, tmp_path / "none.csv")
    with (tmp_path / "none.csv").open() as stream:
        assert [row["labels"] for row in csv.DictReader(stream)] == [""] * len(files)


def test_the_remote_file_gives_the_same_logits_and_loss(artifact: Path, pixel_values: torch.Tensor) -> None:
    labels = (torch.arange(64).reshape(8, 8) % 3 == 0).float()
    ours = TaskResCLIPForImageClassification.from_pretrained(artifact)(pixel_values, labels=labels)
    from taskres_hf.remote import modeling_taskres as remote

    theirs = remote.TaskResCLIPForImageClassification.from_pretrained(artifact)(pixel_values, labels=labels)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-5)
    assert torch.allclose(ours.loss, theirs.loss, atol=1e-6)
    assert torch.allclose(ours.loss, F.binary_cross_entropy_with_logits(ours.logits, labels))


def test_what_is_claimed_is_derived_again(artifact: Path, made: Any) -> None:
    train, test = (Dataset.from_dict(made[part].to_dict(), made[part].features) for part in ("train", "test"))
    from datasets import DatasetDict

    rows = verify(artifact, DatasetDict({"train": train, "test": test}), train_split="train", split="test")
    results = {row["what"]: row["result"] for row in rows}
    assert "differs" not in results.values()
    assert results["few-shot draw"] == results["map"] == results["micro f1"] == "matches"


@pytest.mark.parametrize("recipe", ["auto-v1", "paper"])
def test_recipes_by_epochs_learn_by_binary_cross_entropy(base: str, spec: Any, made: Any, recipe: Any) -> None:
    losses = {}
    for closed_form in (True, False):
        settings = {"recipe": recipe, "num_train_epochs": 12, "closed_form": closed_form, "augment_online": False}
        trainer = _trainer(base, spec, made, shots=4, **settings)
        trainer.train()
        losses[closed_form] = [row["loss"] for row in trainer.log_history]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)
    assert losses[True][-1] < losses[True][0] < 1.0
    assert trainer.model.classifier.class_bias is not None
    metrics = trainer.cross_validate(3)
    assert metrics["folds"] == 3
    assert 0 < metrics["map"] <= 1


def test_the_best_epoch_is_that_of_map(base: str, spec: Any, made: Any) -> None:
    seen = []

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.label_ids.shape)
        return {"mine": 1.0}

    trainer = _trainer(base, spec, made, num_train_epochs=4, load_best_model_at_end=True)
    trainer.compute_metrics = compute
    trainer.train()
    maps = [row["eval_map"] for row in trainer.log_history]
    assert trainer.model.config.training["best_epoch"] == 1 + maps.index(max(maps))
    assert seen[0] == (40, 8)


def test_auto_is_deterministic_and_probabilities_mean_what_they_say(base: str, spec: Any, made: Any) -> None:
    trainer = _trainer(base, spec, made)
    data, test = trainer.embed(made["train"]), trainer.embed(made["test"])
    head = trainer.model.classifier
    fits = [fit_multi_label(data.image_embeds[0], data.labels, head.base, head.logit_scale) for _ in range(2)]
    assert torch.equal(fits[0].weight, fits[1].weight)
    assert torch.equal(fits[0].bias, fits[1].bias)
    unit = F.normalize(test.image_embeds[0].double(), dim=1)
    scores = torch.sigmoid(unit @ fits[0].weight.T + fits[0].bias)
    assert float(scores.mean()) == pytest.approx(float(test.labels.mean()), abs=0.08)


@pytest.mark.parametrize("column", [0.0, 1.0])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_a_class_on_no_picture_or_on_all_is_fitted(column: float, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images, base = torch.randn(count, 16, generator=generator), torch.randn(2, 16, generator=generator)
    labels = torch.stack([torch.arange(count) % 2 * 1.0, torch.full((count,), column)], dim=1)
    fitted = fit_multi_label(images, labels, base, 100.0)
    assert bool(fitted.weight.isfinite().all())
    logits = F.normalize(images.double(), dim=1) @ fitted.weight.T + fitted.bias
    if count == 12:
        assert bool(((logits[:, 1] > 0) == (column > 0)).all())


def test_classes_without_a_picture_are_refused_and_those_on_all_named(base: str, spec: Any, made: Any) -> None:
    never = made["train"].map(lambda row: {"labels": [label for label in row["labels"] if label != 3]})
    with pytest.raises(FewShotError, match="sea creature"):
        _trainer(base, spec, {**made, "train": never}).train()
    always = made["train"].map(lambda row: {"labels": [*row["labels"], 3]})
    with pytest.warns(UserWarning, match="on every training picture"):
        _trainer(base, spec, {**made, "train": always}).train()


def test_metrics_of_hand_made_numbers() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.0], [-2.0, 1.0, 0.0], [1.0, -3.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    metrics = multi_label_metrics(logits, labels, ["a", "b", "c"], threshold=0.6)
    assert metrics["map"] == 1.0
    assert metrics["micro_f1"] == pytest.approx(0.8)
    assert metrics["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["unmeasured_classes"] == ["c"]
    assert compare_multi_label(logits, logits, labels, ["a", "b", "c"])["zero_shot_map"] == 1.0
    for wrong in (labels[:, :2], labels * 0.5, torch.ones_like(labels)):
        with pytest.raises(DataError):
            multi_label_metrics(logits, wrong)


@pytest.mark.parametrize("labels", [torch.tensor([1]), torch.full((1, 8), float("nan")), torch.full((1, 8), 2.0)])
def test_labels_of_another_kind_are_refused_by_forward(base: str, spec: Any, labels: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="several"):
        _model(base, spec)(image_embeds=torch.ones(1, 192), labels=labels)


def test_nothing_is_read_as_one_label_in_silence(
    base: str, spec: Any, made: Any, splits: Any, artifact: Path, files: list[str], tmp_path: Path,
    model: TaskResCLIPForImageClassification,
) -> None:  # fmt: skip
    quiet = TaskResTrainingArguments(disable_tqdm=True)
    several, _, _ = load_training_data(made["train"], multi_label=True)
    with pytest.raises(DataError, match="several labels each"):
        TaskResTrainer(model, quiet, several).train()
    single, _, _ = load_training_data(splits["train"])
    for dataset in (single, splits["train"]):
        with pytest.raises(DataError, match=r"one label per picture|one each"):
            TaskResTrainer(_model(base, spec), quiet, dataset).train()
    with pytest.raises(ConfigurationError, match="enhanced_base"):
        _trainer(base, spec, made, enhanced_base=True).train()
    with pytest.raises(ConfigurationError, match="not trained"):
        list(classify_files(_model(base, spec), files))
    data = TaskResTrainer(_model(base, spec), quiet).embed(made["train"])
    with pytest.raises(ConfigurationError, match="one label per picture"):
        METHODS["gda"]().fit(data, model.classifier)
    loaded = TaskResCLIPForImageClassification.from_pretrained(artifact)
    loaded.strength = 0.5
    with pytest.raises(ConfigurationError, match="strength 1"):
        loaded(image_embeds=torch.ones(1, 192))
    with pytest.raises(ConfigurationError, match="problem_type"):
        TaskResCLIPForImageClassification.from_base(base, ["a", "b"], problem_type="regression")
    with pytest.raises(ConfigurationError, match="problem_type"):
        AutoModelForImageClassification.from_pretrained(artifact, problem_type="single_label_classification")
    forged = forge(copied(artifact, tmp_path / "older"), format_version=2)
    with pytest.raises(ArtifactError, match="problem_type"):
        TaskResCLIPForImageClassification.from_pretrained(forged)


def test_from_a_table_to_predictions_by_command(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = made["train"].features["labels"].feature.names
    lines = ["file_name,labels,split"]
    for part in ("train", "test"):
        for place, row in enumerate(made[part]):
            row["image"].save(tmp_path / f"{part}{place}.png")
            lines.append(f"{part}{place}.png,{'|'.join(names[label] for label in row['labels'])},{part}")
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    options = ["--base-model", "shipped", "--template", "a drawing of a {}.", "--json"]
    code, out, error = run(capsys, "train", tmp_path, *options, "-o", "out")
    assert code == 1
    assert "--multi-label" in out + error
    code, out, _ = run(capsys, "train", tmp_path, *options, "--multi-label", "-o", "out")
    result = json.loads(out)
    assert code == 0
    assert result["map"] > result["zero_shot_map"]
    code, out, _ = run(capsys, "evaluate", "out", tmp_path, "--json")
    assert json.loads(out)["map"] == pytest.approx(result["map"])
    code, out, _ = run(capsys, "evaluate", "out", tmp_path)
    assert "micro-F1" in out
    code, out, _ = run(capsys, "predict", "out", "test0.png", "test1.png", "-o", "labels.csv")
    assert code == 0
    header, *rows = csv.reader((tmp_path / "labels.csv").read_text().splitlines())
    assert header == ["file", "labels", "scores", "error"]
    assert all(set(row[1].split("|")) <= {*names, ""} for row in rows)
    code, out, _ = run(capsys, "info", "out")
    assert "multi_label_classification" in out


def test_rejection_is_refused(
    base: str, spec: dict[str, Any], made: Any, artifact: Path, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match=r"Rejection.*gives several, or none"):
        _trainer(base, spec, made, shots=4, reject=0.2).train()
    trainer = _trainer(base, spec, made, shots=4)
    for refused in (trainer.choose_rejection, trainer.model.rejecting):
        with pytest.raises(ConfigurationError, match=r"Rejection.*gives several, or none"):
            refused()
    code, _, error = run(capsys, "predict", artifact, *files[:1], "--reject")
    assert code == 1
    assert "gives several, or none" in error
    for option in (["--reject", "0.2"], ["--report", "page.html"]):
        code, _, error = run(capsys, "train", "tags.csv", "--multi-label", *option)
        assert code == 1
        assert option[0] in error


def test_each_picture_of_a_cross_validation_is_judged_by_the_threshold_of_its_fold(
    base: str, spec: dict[str, Any], made: Any
) -> None:
    trainer = _trainer(base, spec, made, shots=4)
    data, found = trainer.cross_validated_logits(3)
    assert found.thresholds.shape == (len(found.rows), 1)
    assert len(found.thresholds.unique()) > 1
    given = found.logits.double().sigmoid() >= found.thresholds
    right = (given & (data.labels[found.rows] > 0)).sum()
    wanted = float(2 * right / (given.sum() + data.labels[found.rows].sum()))
    assert trainer.cross_validate(3)["micro_f1"] == pytest.approx(wanted, abs=1e-6)


def test_a_notebook_shows_what_was_measured(artifact: Path) -> None:
    shown = TaskResCLIPForImageClassification.from_pretrained(artifact)._repr_html_()
    assert "mAP" in shown
    assert "accuracy" not in shown
