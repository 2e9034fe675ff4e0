"""`TaskResForImageClassification`: its artifact, what it shares with the dual encoder's class, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from image_towers import tiny_classifier
from support import copied, forge, random_residual, run, same_predictions
from transformers import AutoModelForImageClassification, pipeline

from taskres_hf import ClassifierPool, TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf import TaskResForImageClassification as Model
from taskres_hf.analysis.learned import Learned
from taskres_hf.checking import verify
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError, BaseMismatchError, ConfigurationError
from taskres_hf.export.fused import FusedClassifier
from taskres_hf.pool import pack, pack_with_base
from taskres_hf.report import write_report

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["head", "class_means"])
def saved(request: Any, classifier: Callable[[str], str], splits: Any, tmp_path_factory: Any) -> Path:
    """A trained classifier over each kind of rows; do not change it."""
    names = splits["train"].features["label"].names
    model = Model.from_base(classifier("vit"), names, base_classifier=request.param)
    arguments = TaskResTrainingArguments(shots=4, recipe="auto-v1", disable_tqdm=True, reject=0.2)
    trainer = TaskResTrainer(model, arguments, splits["train"], splits["test"])
    trainer.train()
    trainer.measure()
    folder: Path = tmp_path_factory.mktemp(request.param) / "saved"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(splits: Any, tmp_path_factory: Any) -> Path:
    """A folder with two classes, `red` and `blue`, of four pictures each."""
    folder: Path = tmp_path_factory.mktemp("pictures")
    rows = splits["train"].sort("label")
    for name, start in (("blue", 0), ("red", len(rows) - 4)):
        (folder / name).mkdir()
        for number in range(4):
            rows[start + number]["image"].convert("RGB").save(folder / name / f"{number}.png")
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(PIXELS).logits
    return found


def test_whatever_loads_it_gives_this_class(saved: Path) -> None:
    model = Model.from_pretrained(saved)
    for other in (TaskResCLIPForImageClassification, AutoModelForImageClassification):
        again = other.from_pretrained(saved)
        assert type(again) is Model
        assert torch.equal(logits(again), logits(model))
    assert model.backbone is model.clip


def test_the_artifact_is_the_residual_alone(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["format_version"] == 4
    assert (saved / "model.safetensors").stat().st_size < 20_000
    facts = describe(saved)
    assert facts["base_classifier"] == saved.parent.name.rstrip("0123456789")
    assert facts["enhanced_base"] is False
    card = (saved / "README.md").read_text()
    assert "image tower" in card
    assert "Templates" not in card
    assert "dual encoder" not in card
    assert "- clip" not in card


def test_another_tower_or_head_is_noticed(saved: Path, labels: list[str], tmp_path: Path) -> None:
    kind = json.loads((saved / "config.json").read_text())["base_classifier"]
    for part in ("patch_embeddings", "classifier"):
        other = tiny_classifier("vit", labels)
        with torch.no_grad():
            for name, weight in other.named_parameters():
                if part in name:
                    weight.mul_(1.5)
        if part == "classifier" and kind == "class_means":  # whose head plays no part
            Model.from_pretrained(saved, base_model=other)
            continue
        with pytest.raises(BaseMismatchError):
            Model.from_pretrained(saved, base_model=other)
        Model.from_pretrained(saved, base_model=other, accept_base_mismatch=True)


def test_one_tower_serves_several(saved: Path) -> None:
    model = Model.from_pretrained(saved)
    again = Model.from_pretrained(saved, base_model=model.clip)
    assert again.clip is model.clip
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format_version 4"), ({"base_classifier": None}, "format_version 4"),
        ({"base_classifier": "text"}, "base_classifier"), ({"normalize_weight": False}, "normalize_weight"),
        ({"problem_type": "multi_label_classification"}, "problem_type"), ({"residual_side": "image"}, "image side"),
    ],
)  # fmt: skip
def test_a_forged_config_is_refused(changes: dict[str, Any], message: str, saved: Path, tmp_path: Path) -> None:
    folder = forge(copied(saved, tmp_path / "forged"), **changes)
    with pytest.raises((ArtifactError, ConfigurationError), match=message):
        Model.from_pretrained(folder)


def test_a_classifier_over_a_dual_encoder_is_not_loaded_by_this_class(trained: Path) -> None:
    with pytest.raises(ConfigurationError, match="over a dual encoder"):
        Model.from_pretrained(trained)


def test_classes_are_removed_reordered_and_renamed(saved: Path, tmp_path: Path) -> None:
    model = Model.from_pretrained(saved)
    before, names = logits(model), model.class_names
    model.remove_classes([names[1]]).rename_classes({names[0]: "first"})
    model.reorder_classes([*names[2:], "first"])
    torch.testing.assert_close(logits(model), before[:, [*range(2, len(names)), 0]])
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(logits(Model.from_pretrained(tmp_path / "changed")), logits(model))


def test_what_reads_text_is_refused(saved: Path, classifier: Callable[[str], str], splits: Any, tmp_path: Path) -> None:
    model = Model.from_pretrained(saved)
    asked: list[Callable[[], Any]] = [
        lambda: model.add_classes(["new"]),
        lambda: model.rename_classes({model.class_names[0]: "new"}, reembed=True),
        lambda: Model.merge_residuals([model, model]),
        lambda: Model.unite([model, model]),
        lambda: model.tokenizer,
        lambda: model.save_pretrained(tmp_path / "code", include_code=True),
        lambda: FusedClassifier(model),
        lambda: Learned(model.classifier),
        lambda: write_report(model, tmp_path / "report.html"),
        lambda: Model.from_base(classifier("vit"), ["a", "b"], templates="a {}"),
        lambda: Model.from_base(classifier("vit"), ["a", "b"], problem_type="multi_label_classification"),
        lambda: TaskResTrainer(model, TaskResTrainingArguments(enhanced_base=True), splits["train"]).train(),
    ]
    for ask in asked:
        with pytest.raises(ConfigurationError):
            ask()
    assert list(tmp_path.iterdir()) == []


def test_what_it_claims_can_be_checked(saved: Path) -> None:
    assert {row["result"] for row in verify(saved) if row["what"].startswith("base")} == {"matches"}


def test_pushed_and_loaded(saved: Path, hub: HubServer, classifier: Callable[[str], str]) -> None:
    Model.from_pretrained(saved).push_to_hub("tester/towers")
    again = Model.from_pretrained("tester/towers", base_model=classifier("vit"))
    assert torch.equal(logits(again), logits(Model.from_pretrained(saved)))


def test_two_tasks_over_one_tower(classifier: Callable[[str], str]) -> None:
    model = Model.from_base(classifier("vit"), ["red", "blue"])
    other = random_residual(Model.from_base(model.clip, ["one", "two", "three"]))  # type: ignore[arg-type]
    model.use_classifier(other)
    assert model.class_names == ["one", "two", "three"]


def test_rows_of_a_head_and_class_means_do_not_serve_each_other(
    classifier: Callable[[str], str], labels: list[str]
) -> None:
    """Their tower is one, and the refusal does not say otherwise."""
    model = Model.from_base(classifier("vit"), labels[:2])
    other = Model.from_base(classifier("vit"), ["red", "blue"])
    for one, two in ((model, other), (other, model)):
        with pytest.raises(ConfigurationError, match=r"different base classifiers: .*base_classifier="):
            one.use_classifier(two)


# ---------------------------------------------------------------------- the command line


def test_the_commands(
    classifier: Callable[[str], str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, text, error = run(
        capsys, "train", pictures, "--base-model", classifier("vit"), "--shots", 2, "-o", out, "--json"
    )
    assert code == 0, error
    assert json.loads(text)["classes"] == 2
    code, text, _ = run(capsys, "info", out, "--json")
    assert json.loads(text)["base_classifier"] == "class_means"
    assert run(capsys, "evaluate", out, pictures, "--json")[0] == 0
    code, text, _ = run(capsys, "predict", out, pictures, "--json")
    assert code == 0
    code, _, error = run(capsys, "train", "--config", out / "run.yaml", "-o", tmp_path / "again", "--json")
    assert code == 0, error
    again = (tmp_path / "again" / "model.safetensors").stat().st_size
    assert again == (out / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template", "a {}."], "--templates"), (["--multi-label"], "--multi-label"),
        (["--base-classifier", "head"], "no label"), (["--residual-side", "image"], "--residual-side"),
        (["--report", "r.html"], "report"),
    ],
)  # fmt: skip
def test_options_without_meaning(
    options: list[str], message: str, classifier: Callable[[str], str], pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    asked = ["train", pictures, "--base-model", classifier("vit"), "-o", tmp_path / "out", *options]
    code, _, error = run(capsys, *asked)
    assert code != 0
    assert message in " ".join(error.split())
    assert not (tmp_path / "out").exists()


def test_base_classifier_is_not_for_dual_encoders(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train", pictures, "--base-model", "shipped", "-o", tmp_path / "out", "--base-classifier", "head"]
    code, _, error = run(capsys, *asked)
    assert code != 0
    assert "images alone" in " ".join(error.split())


def test_it_is_served_with_the_scores_of_pipeline(saved: Path, pictures: Path) -> None:
    pytest.importorskip("fastapi_offline", reason="needs the serve extra")
    from starlette.testclient import TestClient

    from taskres_hf.service import create_app

    picture = pictures / "red" / "0.png"
    expected = pipeline("image-classification", model=str(saved))(str(picture), top_k=8)
    with TestClient(create_app({"one": saved, "two": saved})) as client:
        reply = client.post("/v1/models/two/classify", files={"file": picture.read_bytes()}, params={"top_k": 8})
    assert reply.status_code == 200, reply.text
    assert same_predictions(reply.json()["results"][0]["predictions"], expected)


def test_no_pool_and_no_packed_file(saved: Path, trained: Path, tmp_path: Path) -> None:
    model, pool, to = Model.from_pretrained(saved), ClassifierPool(), tmp_path / "pool.safetensors"
    for source in (saved, model):
        with pytest.raises(
            ConfigurationError, match="over an image tower alone or of texts, and pools and packed files"
        ):
            pool.add("one", source)
    with pytest.raises(ConfigurationError, match="over an image tower alone"):
        ClassifierPool(model)
    for way in (pack, pack_with_base):
        with pytest.raises(ConfigurationError, match="over an image tower alone"):
            way({"one": saved}, to)
    assert not to.exists()
    pool.add("one", trained)
    assert pool.names == ["one"]


@pytest.mark.parametrize(("rows", "advice"), [("head", "pretrained head alone"), ("class_means", "the first class")])
def test_where_training_did_harm_the_advice_speaks_of_no_prompts(
    rows: str, advice: str, classifier: Callable[[str], str], splits: Any
) -> None:
    model = Model.from_base(classifier("vit"), splits["train"].features["label"].names, base_classifier=rows)
    head = model.classifier
    with torch.no_grad():
        rare = int(torch.bincount(torch.tensor(splits["test"]["label"]), minlength=len(head.base)).argmin())
        head.class_bias = 1e4 * torch.nn.functional.one_hot(torch.tensor(rare), len(head.base)).float()
    arguments = TaskResTrainingArguments(disable_tqdm=True)
    with pytest.warns(UserWarning, match=f"below zero-shot.*{advice}") as caught:
        TaskResTrainer(model, arguments, splits["train"], splits["test"]).measure()
    assert not any("prompts" in str(one.message) for one in caught)
