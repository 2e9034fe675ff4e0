"""The runner: every cell once, the same again, targets, reports."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import PAPER, run

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.demo import demo_dataset
from taskres_hf.embedding import embedder as embedder_module
from taskres_hf.errors import ConfigurationError
from taskres_hf.few_shot import few_shot_indices
from taskres_hf.paper import datasets, runner
from taskres_hf.paper.datasets import open_dataset, suite_datasets
from taskres_hf.paper.reports import (
    as_markdown,
    comparable_results,
    published_configs,
    published_results,
    summarise,
    write_reports,
)
from taskres_hf.paper.runner import accuracies, few_shot_runs, grid, run_benchmark, task_runs
from taskres_hf.storage import read_sealed, write_json


def test_finished_cells_are_not_run_again(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"shots": [1, 2], "seeds": [1], "recipes": ["auto"]}
    first = run_benchmark(base, ["food"], tmp_path, **options)
    monkeypatch.setattr(TaskResTrainer, "train", None)  # would fail if anything were run
    seen: list[bool] = []
    again = run_benchmark(
        base, ["food"], tmp_path, on_cell=lambda cell, result, done: seen.append(done),
        arguments={"embed_batch_size": 7}, **options,
    )  # fmt: skip
    assert again == first
    assert seen == [True, True]
    with pytest.raises(ConfigurationError, match=r"settings was .* another output folder"):
        run_benchmark(base, ["food"], tmp_path, views=2, **options)


@pytest.mark.parametrize("changed", ["train", "test"])
def test_cells_of_other_pictures_are_not_reused(
    base: str, tmp_path: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"shots": [1], "seeds": [1], "recipes": ["auto"]}
    (first,) = run_benchmark(base, ["food"], tmp_path, **options)
    assert run_benchmark(base, ["food"], tmp_path, **options) == [first]
    data = open_dataset("food")
    part = data.splits[changed]
    other = part.select([*range(1, len(part)), 0])
    monkeypatch.setattr(runner, "open_dataset", lambda *_, **__: replace(data, splits={**data.splits, changed: other}))
    with pytest.raises(ConfigurationError, match="pictures or labels of food were others"):
        run_benchmark(base, ["food"], tmp_path, **options)


def test_a_damaged_cell_is_run_again(base: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shots": [1], "seeds": [1], "recipes": ["auto"]}
    first = run_benchmark(base, ["food"], tmp_path, **options)
    (cell,) = (tmp_path / "cells").iterdir()
    cell.write_text('{"accur')
    with pytest.warns(UserWarning, match="This run is made again"):
        assert run_benchmark(base, ["food"], tmp_path, **options) == first
    assert read_sealed(cell) == first[0]


@pytest.mark.parametrize("side", ["text", "vision"])
def test_cells_of_another_base_are_not_reused(base: str, tmp_path: Path, side: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    options: dict[str, Any] = {"shots": [1], "seeds": [1], "recipes": ["auto"]}
    (first,) = run_benchmark(str(folder), ["food"], tmp_path / "out", **options)
    assert first["base"]["sketch"]
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = f"{side}_model.encoder.layers.0.mlp.fc1.weight"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ConfigurationError, match="base's weights, tokenizer or prompts"):
        run_benchmark(str(folder), ["food"], tmp_path / "out", **options)
    # A cell of before, which does not say what it ran on, is not taken either.
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    write_json(cell, {key: value for key, value in first.items() if key != "base"})
    with pytest.raises(ConfigurationError, match="base's weights"):
        run_benchmark(str(folder), ["food"], tmp_path / "out", **options)


def test_paper_embeds_in_fp32_by_torch_wherever_it_runs(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[str, str]] = []
    real = embedder_module.make_engine

    def choose(base: Any, engine: str = "auto", precision: str = "auto", *more: Any) -> Any:
        chosen.append((engine, precision))
        return real(base, engine, "bf16" if precision == "auto" else precision, *more)

    monkeypatch.setattr(embedder_module, "make_engine", choose)  # a processor that multiplies bf16
    options: dict[str, Any] = {"shots": [1], "seeds": [1], "views": 0}
    results = run_benchmark(base, ["food"], tmp_path, recipes=["paper", "auto"], **options)
    ran = {result["recipe"]: result["engine"] for result in results}
    assert "fp32" in ran["paper"]
    assert "bf16" in ran["auto"]
    assert ("torch", "fp32") in chosen
    assert results[0]["training"]["engine"] == ran["paper"]
    assert f"embedded by {ran['paper']}" in as_markdown(results, base)
    monkeypatch.setattr(embedder_module, "make_engine", real)  # resumed on one that does not
    run_benchmark(base, ["food"], tmp_path, recipes=["paper"], **options)
    with pytest.raises(ConfigurationError, match=r"engine was .*bf16"):
        run_benchmark(base, ["food"], tmp_path, recipes=["auto"], **options)


def test_paper_is_the_published_whole(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    described = json.loads(json.dumps(suite_datasets()))
    described["food"] |= {"alpha": 1.0, "learning_rate": 2e-4}
    monkeypatch.setattr(datasets, "suite_datasets", lambda: described)
    data = datasets.open_dataset("food")
    data.class_names[0] += "_dish"
    for split in data.splits.values():
        split.class_names = data.class_names
    monkeypatch.setattr(runner, "open_dataset", lambda *_, **__: data)
    monkeypatch.setattr(runner, "PAPER_VIEWS", 2)
    prompts: dict[str, str] = {}
    trained: dict[str, Any] = {}
    real = TaskResTrainer.train

    def train(self: TaskResTrainer, *arguments: Any) -> Any:
        prompts[self.args.recipe] = self.model.class_prompts()[0][0]
        trained[self.args.recipe] = self.train_dataset
        return real(self, *arguments)

    monkeypatch.setattr(TaskResTrainer, "train", train)
    paper, auto = run_benchmark(base, ["food"], shots=[8], seeds=[1])
    assert "_dish" in prompts["paper"]
    assert " dish" in prompts["auto"]
    assert len(trained["paper"].image_embeds) == 2
    assert len(trained["auto"].image_embeds) == 1
    ran = paper["training"]
    assert (ran["learning_rate"], ran["alpha"], ran["views"], ran["underscores"]) == (2e-4, 1.0, 2, "keep")
    assert paper["train_images"] < 8 * 7
    assert ran["num_train_epochs"] == 200  # the shots asked for decide, not what short classes have
    assert auto["training"]["learning_rate"] != 2e-4
    text = as_markdown([paper, auto], base)
    assert "recipe paper: 2 cached views, underscores kept" in text
    assert "recipe auto: plain pictures, underscores as spaces" in text
    monkeypatch.setattr(TaskResTrainer, "train", real)
    (online,) = run_benchmark(
        base, ["food"], shots=[1], seeds=[1], recipes=["paper"], augment_online=True, arguments={"num_train_epochs": 2}
    )
    assert online["training"]["augment_online"] is True
    assert "augmented afresh each epoch" in as_markdown([online], base)


def test_the_shots_asked_for_decide_the_epochs(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "few_shot_indices", lambda labels, *_, **__: [labels.index(k) for k in range(7)])
    for shots, epochs in ((4, 100), (8, 200)):
        (result,) = run_benchmark(base, ["food"], shots=[shots], seeds=[1], recipes=["paper"], views=0)
        assert (result["train_images"], result["training"]["num_train_epochs"]) == (7, epochs)


def test_interrupted_runs_go_on(base: str, tmp_path: Path) -> None:
    def stop(cell: Any, result: Any, done: bool) -> None:
        if cell.seed == 2:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"shots": [2], "seeds": [1, 2, 3], "recipes": ["auto"]}
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(base, ["food"], tmp_path / "a", on_cell=stop, **options)
    assert len(list((tmp_path / "a" / "cells").iterdir())) == 2
    resumed = run_benchmark(base, ["food"], tmp_path / "a", **options)
    assert resumed == run_benchmark(base, ["food"], tmp_path / "b", **options)


def test_accuracies_are_those_of_training_by_hand(base: str, spec: Any, splits: Any) -> None:
    results = run_benchmark(base, ["animals-plants"], shots=[4], seeds=[1, 2], recipes=["auto"])
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    for result in results:
        model.classifier.reset()
        arguments = TaskResTrainingArguments(shots=4, seed=result["seed"], on_short="ignore", disable_tqdm=True)
        TaskResTrainer(model, arguments, splits["train"]).train()
        test = TaskResTrainer(model, arguments).embed(splits["test"])
        assert result["zero_shot_accuracy"], result["accuracy"] == accuracies(model, test)
    # One test picture of this task is also a training picture.
    assert [result["seen_in_training"] for result in results] == [0, 0]
    (whole,) = run_benchmark(base, ["animals-plants"], shots=[99], seeds=[1], recipes=["auto"])
    assert whole["seen_in_training"] == 1
    assert "up to 1 test pictures were drawn" in as_markdown([whole], base)


def test_one_loop_serves_other_experiments(base: str, spec: Any, splits: Any) -> None:
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True))
    train, test = trainer.embed(splits["train"]), trainer.embed(splits["test"])
    runs = list(
        few_shot_runs(
            model, grid("mine", [1, 2], [3], ["auto", "brief"]),
            lambda cell: train.select(few_shot_indices(train.labels.tolist(), cell.shots, cell.seed)),
            lambda cell: {"all": (test, None), "two classes": (test, [0, 1])},
            lambda cell: {"num_train_epochs": 1} if cell.recipe == "brief" else {},
        )
    )  # fmt: skip
    assert [(cell.shots, cell.recipe) for cell, _ in runs] == [(1, "auto"), (1, "brief"), (2, "auto"), (2, "brief")]
    assert len({scores["all"][0] for _, scores in runs}) == 1
    before, after = runs[3][1]["all"]
    assert before == after  # the one epoch is the warm-up
    before, after = runs[2][1]["all"]
    assert before != after


def test_draws_are_stored_and_replayable(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_benchmark(base, ["food"], tmp_path, shots=[2], seeds=[5], recipes=["paper"])
    draw = tmp_path / "few_shot" / "food" / "shot_2-seed_5.json"
    content = read_sealed(draw)
    assert len(content["indices"]) == len(content["labels"]) == len(content["files"]) == 14
    data = Path(runner.__file__).parents[1] / "demo_data" / "food"
    code, _, _ = run(
        capsys, "train", "--base-model", base, "--dataset", data, "--indices", draw, "--epochs", 1,
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert code == 0


def test_domain_generalisation_and_class_subsets(base: str, tmp_path: Path) -> None:
    (result,) = run_benchmark(base, ["all-categories"], tmp_path, shots=[1], seeds=[1], recipes=["auto"])
    assert set(result["targets"]) == {"emojione-monotone", "fluent-emoji-high-contrast", "fxemoji"}
    assert all(0 <= pair["accuracy"] <= 1 for pair in result["targets"].values())
    rows = {row["dataset"] for row in summarise([result])}
    assert "all-categories -> fxemoji" in rows


def test_only_the_rows_of_a_subset_compete(base: str, spec: Any, splits: Any) -> None:
    model = TaskResCLIPForImageClassification.from_base(base, spec["classes"], spec["template"])
    test = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True)).embed(splits["test"])
    chosen = test.select(torch.nonzero(test.labels == 0).flatten().tolist())
    assert accuracies(model, chosen, [0])[0] == 1.0  # nothing else to choose from
    assert accuracies(model, chosen, [0, 1])[0] >= accuracies(model, chosen)[0]


def test_reports(base: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    results = run_benchmark(
        base, ["food", "faces"], tmp_path, shots=[1, 2], seeds=[1, 2], recipes=["paper", "auto"], views=0
    )
    files = write_reports(results, tmp_path, base)
    assert [file.name for file in files] == ["results.csv", "results.md", "accuracy.svg"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 16
    table = {(row["dataset"], row["recipe"]): row for row in summarise(results)}
    picked = [
        float(row["accuracy"]) for row in rows if (row["dataset"], row["recipe"], row["shots"]) == ("food", "auto", "2")
    ]
    assert table["food", "auto"]["accuracy"][2] == pytest.approx(100 * sum(picked) / 2)
    spread = 100 * abs(picked[0] - picked[1]) / 2**0.5
    assert table["food", "auto"]["spread"][2] == pytest.approx(spread)
    assert f"{100 * sum(picked) / 2:.1f} ± {spread:.1f}" in (tmp_path / "results.md").read_text()
    by_seed = [
        50
        * sum(float(row["accuracy"]) for row in rows if (row["recipe"], row["shots"], row["seed"]) == ("auto", "2", n))
        for n in "12"
    ]
    assert table["mean", "auto"]["accuracy"][2] == pytest.approx(sum(by_seed) / 2)
    assert table["mean", "auto"]["spread"][2] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
    assert b"<svg" in files[2].read_bytes()
    before = files[2].read_bytes()
    write_reports(results, tmp_path, base)
    assert files[2].read_bytes() == before


def test_published_figures_only_beside_the_same_backbone() -> None:
    rows = published_results()
    assert {row["certainty"] for row in rows} == {"file", "table", "figure"}  # nothing from memory
    assert all(row["source"] for row in rows)
    assert {row["backbone"] for row in published_configs()} == {"RN50", "RN101", "RN50x16", "ViT-B/32", "ViT-B/16"}
    assert all(row["learning_rate"] == 2e-4 and row["epochs"] == "200" for row in published_configs()[2:])
    cell = {
        "shots": 1,
        "seed": 1,
        "recipe": "paper",
        "zero_shot_accuracy": 0.5,
        "accuracy": 0.6,
        "targets": {},
        "notes": [],
    }
    eleven = [{**cell, "dataset": name} for name in PAPER]
    assert comparable_results("somewhere/tiny-clip", eleven) == []
    assert comparable_results("openai/clip-vit-base-patch16", eleven[:3]) == []
    rows = comparable_results("openai/clip-vit-base-patch16", eleven)
    assert {"TaskRes", "CLIP-LoRA", "CoOp", "APE-T", "AWT"} <= {row["method"] for row in rows}
    assert {row["backbone"] for row in rows} == {"ViT-B/16"}
    text = as_markdown(eleven, "openai/clip-vit-base-patch16")
    (line,) = [line for line in text.splitlines() if line.startswith("| TaskRes |")]
    assert "| figure |" in line
    assert "CLIP-LoRA" in line


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["benchmark", "--dataset", "food", "--shots", "1", "--seeds", "1", "-o", tmp_path]
    code, text, _ = run(capsys, *arguments)
    assert code == 0
    assert "results.md" in text
    result = json.loads(run(capsys, *arguments, "--json")[1])
    assert {row["recipe"] for row in result["rows"]} == {"paper", "auto"}
    listed = json.loads(run(capsys, "benchmark", "--list", "--json")[1])
    assert {row["name"] for row in listed} == set(suite_datasets())
    facts = json.loads(run(capsys, "benchmark", "--dataset", "shipped", "--check", "--json")[1])
    assert facts["digits"]["test"] == 997
    code, _, error = run(capsys, "benchmark", "--dataset", "oxford_pets", "--root", tmp_path, "--check")
    assert code == 1
    assert "neither parquet files nor pictures" in error


def test_the_list_is_whole_at_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(capsys, "benchmark", "--list")[1]
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for dataset in suite_datasets().values():
        for size in dataset.get("sizes", {}).values():
            assert f" {size} " in text
    assert "train  validation" in text


def test_the_table_fills_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskres_hf.cli import paper as commands

    monkeypatch.setattr(commands.sys.stdout, "isatty", lambda: True, raising=False)
    run = {"dataset": "food", "recipe": "auto", "shots": 1, "seed": 1, "zero_shot_accuracy": 0.4, "accuracy": 0.41}
    with commands._Live(2, 1, show=True) as live:
        assert live.shown
        live.add(None, {**run, "targets": {}}, False)


@pytest.mark.parametrize("recipe", ["auto", "paper"])
def test_an_open_task_gives_what_the_benchmark_gives(base: str, recipe: str) -> None:
    options: dict[str, Any] = {"shots": [1, 2], "seeds": [1]}
    expected = run_benchmark(base, ["food"], recipes=[recipe], targets=[], **options)
    spec = suite_datasets()["food"]
    model = TaskResCLIPForImageClassification.from_base(base, spec["class_names"], spec["template"])
    found = list(task_runs(model, demo_dataset("food"), "food", recipe=recipe, **options))
    assert [row.items() <= result.items() for row, result in zip(found, expected, strict=True)] == [True, True]
