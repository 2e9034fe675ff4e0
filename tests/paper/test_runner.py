"""The runner: every cell once, the same again, targets, reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PAPER, run

from taskres_hf.demo import accuracy_table
from taskres_hf.errors import ConfigurationError
from taskres_hf.paper import runner as benchmarking
from taskres_hf.paper.datasets import suite_datasets
from taskres_hf.paper.runner import (
    as_markdown,
    comparable_results,
    published_results,
    run_benchmark,
    summarise,
    write_reports,
)


def test_finished_cells_are_not_run_again(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"shots": [1, 2], "seeds": [1], "recipes": ["auto"]}
    first = run_benchmark(base, ["food"], tmp_path, **options)
    monkeypatch.setattr(benchmarking, "_DatasetRun", None)  # would fail if anything were run
    seen: list[bool] = []
    again = run_benchmark(base, ["food"], tmp_path, on_cell=lambda cell, result, done: seen.append(done), **options)
    assert again == first
    assert seen == [True, True]
    with pytest.raises(ConfigurationError, match="other settings"):
        run_benchmark(base, ["food"], tmp_path, views=2, **options)


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


def test_accuracies_are_those_of_the_demo(base: str, tmp_path: Path) -> None:
    results = run_benchmark(base, ["food"], tmp_path, shots=[4], seeds=[1, 2], recipes=["auto"])
    expected = accuracy_table(["food"], [4], [1, 2], progress=False)["food"]
    assert [result["accuracy"] for result in results] == expected["trained"][4]
    assert results[0]["zero_shot_accuracy"] == expected["zero_shot"]


def test_draws_are_stored_and_replayable(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_benchmark(base, ["food"], tmp_path, shots=[2], seeds=[5], recipes=["paper"])
    draw = tmp_path / "few_shot" / "food" / "shot_2-seed_5.json"
    content = json.loads(draw.read_text())
    assert len(content["indices"]) == len(content["labels"]) == len(content["files"]) == 14
    data = Path(benchmarking.__file__).parents[1] / "demo_data" / "food"
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


def test_only_the_rows_of_a_subset_compete(base: str, tmp_path: Path) -> None:
    settings = {
        "base_model": base, "revision": None, "views": 0, "enhanced_base": False, "keep_underscores": False,
        "arguments": {},
    }  # fmt: skip
    data = benchmarking.open_dataset("food")
    made = benchmarking._DatasetRun(data, settings, [], [benchmarking.Cell("food", 1, 1, "auto")], None, False)
    keep = made.test.labels == 0
    chosen = made.test.select(torch.nonzero(keep).flatten().tolist())
    assert made._accuracies(chosen, [0])[0] == 1.0  # nothing else to choose from
    assert made._accuracies(chosen, [0, 1])[0] >= made._accuracies(chosen, None)[0]


def test_reports(base: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    results = run_benchmark(base, ["food", "faces"], tmp_path, shots=[1, 2], seeds=[1, 2], recipes=["paper", "auto"])
    files = write_reports(results, tmp_path, base)
    assert [file.name for file in files] == ["results.csv", "results.md", "accuracy.svg"]
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 16
    table = {(row["dataset"], row["recipe"]): row for row in summarise(results)}
    picked = [
        float(row["accuracy"]) for row in rows if (row["dataset"], row["recipe"], row["shots"]) == ("food", "auto", "2")
    ]
    assert table["food", "auto"]["accuracy"][2] == pytest.approx(100 * sum(picked) / 2)
    assert ("mean", "paper") in table
    assert b"<svg" in files[2].read_bytes()
    before = files[2].read_bytes()
    write_reports(results, tmp_path, base)
    assert files[2].read_bytes() == before


def test_published_figures_only_beside_the_same_backbone() -> None:
    rows = published_results()
    assert {row["certainty"] for row in rows} == {"file", "figure", "recalled"}
    assert all(row["source"] for row in rows)
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
    found = comparable_results("openai/clip-vit-base-patch16", eleven)
    assert {row["method"] for row in found} == {"TaskRes", "CLIP-LoRA", "CoOp"}
    assert "published TaskRes (figure)" in as_markdown(eleven, "openai/clip-vit-base-patch16")


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


def test_the_table_fills_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from taskres_hf.cli import paper as cli_research

    monkeypatch.setattr(cli_research.sys.stdout, "isatty", lambda: True, raising=False)
    row = {"dataset": "food", "recipe": "auto", "zero_shot": 40.0, "accuracy": {1: 41.0}}
    with cli_research._Live(2, show=True) as live:
        assert live.shown
        live.update(1, [row], [1, 2])
