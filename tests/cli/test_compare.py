"""`taskres compare` as people use it: one command on their own pictures, tables, files, going on."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from pathlib import Path

import pytest
from datasets import DatasetDict
from support import run

from taskres_hf.methods.method import METHODS
from taskres_hf.paper import compare, figures

FEW = ("--shots", "1,2", "--seeds", "1,2", "--methods", "zero-shot,gda,taskres,taskres-paper")


@pytest.fixture
def photos(tmp_path: Path, splits: DatasetDict, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of class folders without splits; the working directory is beside it."""
    folder = tmp_path / "photos"
    for label, name in enumerate(("mammal", "bird", "reptile or frog")):
        (folder / name).mkdir(parents=True)
        rows = [row for row in splits["train"] if row["label"] == label][:8]
        for number, row in enumerate(rows):
            row["image"].convert("RGB").save(folder / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKRES_BASE_MODEL", "shipped")
    monkeypatch.setenv("COLUMNS", "80")
    return folder


def test_a_folder_is_enough(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    pytest.importorskip("matplotlib", reason="the `plots` extra is not installed")
    code, text, error = run(capsys, "compare", "photos/", "-q", *FEW)
    assert code == 0, error
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("Written")))) <= 100
    for line in text.splitlines():
        if re.match(r"(method|taskres|gda|zero-shot|harm|ECE|Mean)", line):
            assert len(line) <= 80
    assert "± standard deviation over seeds" in text
    said = " ".join(text.split())
    for words in ("harm: the worst against zero-shot", "ECE", "parameters", "seconds", "MB", "p (Holm)"):
        assert words in said
    assert "each seed measures on 50 % of each class" in text
    folder = photos.parent / "taskres-compare"
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert list(rows[0]) == [
        "method", "dataset", "shots", "seed", "accuracy", "ece", "trained_parameters", "fit_seconds",
    ]  # fmt: skip
    assert len(rows) == 4 * 2 * 2
    assert {row["dataset"] for row in rows} == {"photos"}
    written = ["report.md", "accuracy.png", "accuracy.svg", "time.png", "time.svg", "run.yaml"]
    assert all((folder / name).is_file() for name in written)
    assert str(photos.parent) not in (folder / "report.md").read_text()


def test_settings_are_replayed_and_finished_fits_kept(
    capsys: pytest.CaptureFixture[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "compare", "mine=photos", "food", "--holdout", 0.25, "-q", *FEW)[0] == 0
    first = (photos.parent / "taskres-compare" / "results.csv").read_text()
    assert {row["dataset"] for row in csv.DictReader(first.splitlines())} == {"mine", "food"}
    settings = (photos.parent / "taskres-compare" / "run.yaml").read_text()
    assert "taskres compare --config run.yaml" in settings
    for name in ("zero-shot", "gda", "taskres", "taskres-paper"):
        monkeypatch.setitem(METHODS, name, None)  # would fail if anything were fitted
    code, text, error = run(capsys, "compare", "--config", "taskres-compare/run.yaml", "--json")
    assert code == 0, error
    assert (photos.parent / "taskres-compare" / "results.csv").read_text() == first
    value = json.loads(text)
    assert {row["method"] for row in value["methods"]} == {"zero-shot", "gda", "taskres", "taskres-paper"}
    assert {row["method"] for row in value["against_taskres"]} == {"zero-shot", "gda", "taskres-paper"}
    assert value["failures"] == []
    assert value["base_model"] == "shipped"
    listed = json.loads(run(capsys, "compare", "food", "--config", "taskres-compare/run.yaml", "--json")[1])
    assert {row["method"] for row in listed["methods"]} == {"zero-shot", "gda", "taskres", "taskres-paper"}
    assert all("mine" not in line for line in listed["what_ran"])  # what is typed wins over the file
    code, _, error = run(capsys, "compare", "--config", "taskres-compare/run.yaml", "--template", "a {}", "-q")
    assert code == 1
    assert "Choose another output folder" in error


def test_what_fails_is_said_and_nothing_else_stops(
    capsys: pytest.CaptureFixture[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(METHODS["gda"]):  # type: ignore[misc,name-defined]
        def _fit(self, *_: object) -> None:
            raise ImportError("pip install something")

    monkeypatch.setitem(METHODS, "gda", Broken)
    code, text, _ = run(capsys, "compare", "photos", "-q", *FEW)
    assert code == 0
    assert "gda has no result in 4 fits: pip install something" in " ".join(text.split())
    code, text, error = run(capsys, "compare", "photos", "--methods", "gda", "--shots", 1, "--seeds", 1, "--json")
    assert code == 1
    assert json.loads(text)["failures"] == [{"method": "gda", "reason": "pip install something", "count": 1}]
    assert "no method has a result" in error


def test_wrong_use_is_told_before_anything_is_read(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    code, _, error = run(capsys, "compare")
    assert code == 2
    assert "Missing argument" in error
    code, _, error = run(capsys, "compare", "a=photos", "a=food")
    assert code == 2
    assert "one name" in error
    code, _, error = run(capsys, "compare", "photos", "--methods", "gdb")
    assert code == 1
    assert "There is no method 'gdb'" in error
    code, _, error = run(capsys, "compare", "photos", "--shots", "0")
    assert code == 2
    assert not (photos.parent / "taskres-compare").exists()


def test_without_matplotlib_the_figures_are_asked_for(
    capsys: pytest.CaptureFixture[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    code, text, _ = run(capsys, "compare", "photos", "-q", *FEW)
    assert code == 0
    assert 'pip install "taskres_hf[plots]"' in text
    assert not list((photos.parent / "taskres-compare").glob("*.png"))


def test_ctrl_c_keeps_what_is_finished(
    capsys: pytest.CaptureFixture[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fits = compare.TaskRun.cell, []

    def cell(self: compare.TaskRun, *arguments: object) -> object:
        fits.append(arguments)
        if len(fits) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compare.TaskRun, "cell", cell)
    code, _, error = run(capsys, "compare", "photos", "-q", *FEW)
    assert code == 130
    assert "Finished fits are kept in taskres-compare: the same command goes on from there." in error
    folder = photos.parent / "taskres-compare"
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 3
    monkeypatch.setattr(compare.TaskRun, "cell", real)
    assert run(capsys, "compare", "photos", "-q", *FEW)[0] == 0
    assert len((folder / "results.csv").read_text().splitlines()) == 1 + 16


def test_the_list_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(run(capsys, "compare", "--list", "--json")[1])
    assert {row["name"] for row in rows} == set(compare.known_methods())
    assert all(row["title"] and row["source"] for row in rows)
    code, text, _ = run(capsys, "compare", "--list")
    assert code == 0
    assert "taskres-paper" in text
