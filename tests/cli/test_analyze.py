"""`taskres analyze` as people use it: a trained classifier, or tasks to train on."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from hub_server import HubServer
from support import run

from taskres_hf.analysis import analyzing
from taskres_hf.analysis.analyzing import analyse_transfer, class_rows, correlations, summary, task_rows, write_transfer
from taskres_hf.errors import ConfigurationError
from taskres_hf.modeling_taskres import TaskResCLIPForImageClassification
from taskres_hf.paper import compare

HOSTILE = ("=cmd()|'x'!A1", "<script>alert(1)</script>", "\x1b[31mred")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKRES_BASE_MODEL", "shipped")
    monkeypatch.setenv("COLUMNS", "100")


def _folder(path: Path, splits: DatasetDict, names: tuple[str, ...], each: int = 6) -> Path:
    for label, name in enumerate(names):
        (path / name).mkdir(parents=True)
        for number, row in enumerate([row for row in splits["train"] if row["label"] == label][:each]):
            row["image"].convert("RGB").save(path / name / f"{number}.png")
    return path


# ---------------------------------------------------------------------- one classifier


def test_a_classifier_class_by_class(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    code, text, error = run(capsys, "analyze", trained, "--json")
    assert code == 0, error
    found = json.loads(text)
    model = TaskResCLIPForImageClassification.from_pretrained(trained)
    assert {row["name"] for row in found["classes"]} == set(model.class_names)
    zero_shot = found["zero_shot_accuracy"]
    assert found["difficulty"]["rtd"] == pytest.approx(1 / 8 / zero_shot)
    lengths = {row["name"]: row["length"] for row in found["classes"]}
    assert lengths[model.class_names[0]] == pytest.approx(float(model.classifier.residual[0].norm()), rel=1e-5)
    assert found["recipe"] == "auto"
    code, text, _ = run(capsys, "analyze", trained, "-q")
    assert code == 0
    assert "relative transfer difficulty" in text
    assert "Rank correlation over 8 classes" in text
    assert not Path("taskres-analysis").exists()


def test_a_classifier_that_was_not_measured_says_so(
    capsys: pytest.CaptureFixture[str], model: TaskResCLIPForImageClassification, tmp_path: Path
) -> None:
    model.classifier.residual.data.copy_(torch.ones_like(model.classifier.residual))
    model.save_pretrained(tmp_path / "bare")
    code, text, _ = run(capsys, "analyze", "bare", "-q")
    assert code == 0
    assert "no zero-shot accuracy is recorded" in text
    assert json.loads(run(capsys, "analyze", "bare", "--json")[1])["difficulty"] is None


def test_options_of_the_other_use_and_both_at_once_are_refused(
    capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    code, _, error = run(capsys, "analyze", trained, "--shots", "4")
    assert code == 2
    assert "--shots is for DATA" in " ".join(error.replace("│", " ").split())
    code, _, error = run(capsys, "analyze", "food", "--revision", "main")
    assert code == 2
    assert "--revision is for a MODEL" in " ".join(error.replace("│", " ").split())
    code, _, error = run(capsys, "analyze", trained, "food")
    assert code == 1
    assert "one or the other" in error
    code, _, error = run(capsys, "analyze")
    assert code == 2
    assert "Missing argument" in error


def test_what_can_be_either_is_refused_and_can_be_said(
    capsys: pytest.CaptureFixture[str], trained: Path, splits: DatasetDict, tmp_path: Path, hub: HubServer
) -> None:
    both = Path(shutil.copytree(trained, tmp_path / "both"))
    _folder(both, splits, ("mammal", "bird"), each=2)
    code, _, error = run(capsys, "analyze", both)
    assert code == 1
    assert "--kind model or --kind data" in error
    assert run(capsys, "analyze", both, "--kind", "model", "--json")[0] == 0
    hub.add_folder("me/pets", trained)
    found = json.loads(run(capsys, "analyze", "me/pets", "--base-model", "shipped", "--json")[1])
    assert found["artifact"] == "me/pets"
    hub.add_folder("me/pets", tmp_path / "both", "datasets")
    code, _, error = run(capsys, "analyze", "me/pets")
    assert code == 1
    assert "a model and a dataset on the Hub" in error


# ---------------------------------------------------------------------- many tasks


def test_tasks_are_trained_once_and_written_whole(
    capsys: pytest.CaptureFixture[str], splits: DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    _folder(tmp_path / "mine", splits, ("mammal", "bird", "reptile or frog"))
    command = ("analyze", "mine", "food", "--shots", "1,2", "--seeds", "1,2", "-q", "-o", "out")
    code, text, error = run(capsys, *command)
    assert code == 0, error
    assert "2 tasks: no correlation over tasks is given below 4" in text
    assert "Recipe paper, 2 shots, mean over 2 seeds" in text
    names = {"tasks.csv", "classes.csv", "correlations.csv", "transfer.json", "report.md", "run.yaml"}
    assert names | {"transfer.png", "transfer.svg"} <= {file.name for file in Path("out").iterdir()}
    rows = list(csv.DictReader(Path("out/tasks.csv").read_text().splitlines()))
    assert {(row["recipe"], row["shots"], row["dataset"]) for row in rows} == {
        (recipe, shots, name) for recipe in ("paper", "auto") for shots in "12" for name in ("mine", "food")
    }
    for row in rows:
        assert float(row["rtd"]) == pytest.approx(1 / int(row["num_classes"]) / float(row["zero_shot_accuracy"]))
        assert float(row["mean_abs"]) > 0
    assert "mine" in Path("out/transfer.svg").read_text()
    first = Path("out/tasks.csv").read_text()
    monkeypatch.setattr(analyzing, "trained_head", None)  # would fail if anything were trained
    code, text, error = run(capsys, "analyze", "--config", "out/run.yaml", "-o", "out", "--json")
    assert code == 0, error
    assert Path("out/tasks.csv").read_text() == first
    value = json.loads(text)
    assert len(value["tasks"]) == 8
    assert value["failures"] == []
    assert {row["correlation"]["rho"] for row in value["correlations"]} == {None}


def test_fewer_pictures_than_shots_are_not_called_so_many(
    capsys: pytest.CaptureFixture[str], splits: DatasetDict, tmp_path: Path
) -> None:
    _folder(tmp_path / "mine", splits, ("mammal", "bird"))
    options = ("--shots", "1,100", "--seeds", "1", "--recipes", "auto", "-q", "-o", "out")
    code, text, error = run(capsys, "analyze", "mine", *options)
    assert code == 0, error
    assert "Recipe auto, up to 100 shots, mean" in text
    assert "Recipe auto, 1 shot, mean" in Path("out/report.md").read_text()
    rows = {row["shots"]: row for row in csv.DictReader(Path("out/tasks.csv").read_text().splitlines())}
    assert rows["1"]["fewest"] == "1"
    fewest = int(rows["100"]["fewest"])
    assert 1 < fewest < 100
    assert f"mine ({fewest})" in " ".join(text.split())


def test_an_output_folder_that_cannot_be_written_is_told_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "run_tasks", None)  # would fail if anything were begun
    for command in (["analyze", "food"], ["compare", "food"], ["benchmark", "--dataset", "shipped"]):
        code, _, error = run(capsys, *command, "-o", f"{__file__}/out")
        assert (code, "Cannot write" in error) == (1, True), (command, error)


def test_wrong_recipes_are_told_before_anything_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    for recipes in ("papper", "auto,auto", ","):
        code, _, error = run(capsys, "analyze", "food", "--recipes", recipes)
        assert code == 1
        assert "paper, auto, auto-v1" in error
    assert not Path("taskres-analysis").exists()
    with pytest.raises(ConfigurationError, match="auto-v1"):
        analyse_transfer("nowhere", "food", recipes=["taskres"])


def test_hostile_names_are_harmless_in_every_file(splits: DatasetDict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    data = _folder(tmp_path / "data", splits, ("bird", "=cmd()", "$a$ <b>", HOSTILE[2]))
    results = analyse_transfer(
        _shipped(), {HOSTILE[1] + "$x$": str(data)},
        recipes=["auto"], shots=[1], seeds=[1],
    )  # fmt: skip
    files = write_transfer(results, tmp_path / "out", HOSTILE[2])
    for file in files:
        if file.suffix != ".png":
            text = file.read_text()
            assert "\x1b" not in text
            assert file.suffix in (".json", ".csv") or not re.search(r"(?<!\\)<script>", text)
    assert "'=cmd()" in (tmp_path / "out" / "classes.csv").read_text()


def _shipped() -> str:
    from taskres_hf.demo import demo_model

    return demo_model()


def _result(dataset: str, zero_shot: float, size: float, recipe: str = "paper", seed: int = 1) -> dict[str, Any]:
    measures = dict.fromkeys(analyzing.MAGNITUDES, size)
    classes = [
        {"name": name, "support": 5, "zero_shot_accuracy": zero_shot, "accuracy": 0.9, **measures} for name in "ab"
    ]
    return {
        "dataset": dataset, "shots": 4, "seed": seed, "recipe": recipe, "method": recipe, "accuracy": 0.9,
        "zero_shot_accuracy": zero_shot, "num_classes": 2, "num_images": 10, "magnitude": {**measures, "changed": 0.1},
        "classes": classes, "notes": [],
    }  # fmt: skip


def test_correlations_are_over_the_means_of_tasks() -> None:
    """Ten seeds of a task are one task."""
    places = list(enumerate((0.0, 0.2, 0.4, 0.6, 0.8)))
    results = [_result(f"task {n}", accuracy, 5.0 - n, seed=seed) for n, accuracy in places for seed in range(10)]
    rows = task_rows(results)
    assert len(rows) == 5
    assert rows[0]["seeds"] == 10
    found = {(row["measure"], row["difficulty"]): row["correlation"] for row in correlations(rows)}
    assert found["turn", "rtd"].rho == pytest.approx(1.0)  # a task with nothing right has infinite difficulty
    assert found["turn", "rtd"].count == 5
    assert found["gain", "zero_shot_error"].rho == pytest.approx(1.0)
    assert found["changed", "rtd"].rho is None
    text = json.dumps(summary(results, "base"), allow_nan=False)
    assert '"rtd": null' in text
    assert len(class_rows(results)) == 10


def test_a_run_without_a_result_is_left_out_and_named() -> None:
    results = [_result("one", 0.5, 1.0), {"dataset": "two", "shots": 4, "seed": 1, "recipe": "auto", "method": "auto",
                                          "error": "why"}]  # fmt: skip
    assert [row["dataset"] for row in task_rows(results)] == ["one"]
    assert summary(results, "base")["failures"] == [{"method": "auto", "reason": "why", "count": 1}]
    assert write_transfer(results[1:], Path("nothing"), "base") == []
    assert not Path("nothing").exists()
