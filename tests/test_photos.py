"""Tasks of photographs: opened, built from clones of their sources, and learned from where they are at hand."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from support import run

from benchmarks import photo_sources, photos, results
from benchmarks.photo_sources import PUBLISHED, SOURCES, SPLITS, build, candidates, drawn_by_rule
from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.errors import ConfigurationError, DataError

# Names of 30 files of a class, as the sources name theirs.
_NAMES = {
    "clothing": lambda folder, n: f"00{n:02d}c0de-{folder[:1]}.jpg",
    "fruit": lambda folder, n: f"{folder.rpartition('/')[2]}_{n:03d}.jpg",
    "apples-pears": lambda folder, n: f"{folder.rpartition('/')[2]}_{n:03d}.jpg",
    "waste": lambda folder, n: f"{folder}{3 * n + 1}.jpg",
    "sign-digits": lambda folder, n: f"IMG_{4000 + 10 * n + int(folder)}.JPG",
    "coins": lambda folder, n: f"{{}}_{n // 3}_{n}.jpg",  # the split's name before it
}


@pytest.fixture(scope="module")
def clones(splits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of every source, with shipped pictures in place of its own."""
    root = tmp_path_factory.mktemp("clones")
    pictures = [row["image"].convert("RGB") for row in splits["train"].select(range(30))]
    for name, source in SOURCES.items():
        for folder in source.classes.values():
            for part, pattern in source.folders.items():
                place = root / source.clone / pattern.format(folder)
                place.mkdir(parents=True, exist_ok=True)
                if part == "validation" and folder == "Nectarine":
                    continue  # a class without validation pictures, as there are
                for number, picture in enumerate(pictures[: 5 if part == "validation" else 30]):
                    file = place / _NAMES[name](folder, number).format(part)
                    picture.save(file, "JPEG", comment=f"{name} {folder} {part} {number}".encode())
        (root / source.clone / "LICENSE").write_text(source.licence)
    wide = root / "coins-dataset" / "classified" / "train" / "1c" / "train_0_0.jpg"
    pictures[0].resize((400, 330)).save(wide, "JPEG")
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pictures a class than the real tasks have, so that few files do."""
    monkeypatch.setattr(photo_sources, "MOST", {"train": 8, "validation": 2, "test": 10})


def _stored(folder: Path) -> dict[str, list[tuple[bytes, int]]]:
    rows = {split: pyarrow.parquet.read_table(folder / f"{split}.parquet").to_pylist() for split in SPLITS}
    return {split: [(row["image"]["bytes"], row["label"]) for row in part] for split, part in rows.items()}


@pytest.mark.parametrize("name", list(SOURCES))
def test_the_rule_keeps_groups_apart_and_classes_even(clones: Path, name: str) -> None:
    pictures = candidates(clones, name)
    draw = drawn_by_rule(name, pictures)
    assert draw == drawn_by_rule(name, candidates(clones, name))
    groups = {split: {pictures[row].group for row in rows} for split, rows in draw.items()}
    assert not groups["train"] & groups["validation"]
    assert not groups["test"] & (groups["train"] | groups["validation"])
    for split, rows in draw.items():
        counts = Counter(pictures[row].label for row in rows)
        assert len(counts) == len(SOURCES[name].classes), split
        assert max(counts.values()) <= photo_sources.MOST[split]
        assert len(set(rows)) == len(rows)
    labels = [pictures[row].label for row in draw["train"]]
    assert labels != sorted(labels)  # mixed: a reader that takes the first rows meets every class


def test_a_class_without_validation_pictures_gets_some_of_training(clones: Path) -> None:
    pictures = candidates(clones, "fruit")
    nectarine = list(SOURCES["fruit"].classes).index("nectarine")
    rows = [row for row in drawn_by_rule("fruit", pictures)["validation"] if pictures[row].label == nectarine]
    assert {pictures[row].part for row in rows} == {"train"}


def test_tasks_are_built_opened_and_built_again(
    clones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["photos", "--root", str(clones), "--out", str(tmp_path / "one"), "--tasks", "coins", "waste"]
    monkeypatch.setattr(sys, "argv", [*command, "--draw", "rule"])
    photos.main()
    assert "not their very pictures" in capsys.readouterr().out
    monkeypatch.setenv("TASKRES_PHOTOS", str(tmp_path / "one"))
    spec, opened = photos.photo_tasks()["coins"], photos.photo_dataset("coins")
    assert {split: len(part) for split, part in opened.items()} == spec["sizes"]
    assert opened["train"].features["label"].names == spec["classes"]
    assert {min(row["image"].size) for part in opened.values() for row in part} <= {64, 160}
    assert (tmp_path / "one" / "coins-dataset-LICENSE").read_text() == "MIT"
    first = _stored(tmp_path / "one" / "coins")
    build(clones, tmp_path / "two", ["coins"], photos._read_draw(tmp_path / "one" / "draw.json"))
    build(clones, tmp_path / "three", ["coins"], photos._read_draw(tmp_path / "one"))
    assert first == _stored(tmp_path / "two" / "coins") == _stored(tmp_path / "three" / "coins")
    assert (tmp_path / "two" / "draw.json").read_text() == (tmp_path / "three" / "draw.json").read_text()


def test_a_build_takes_the_published_draw_and_refuses_other_files(
    clones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["photos", "--root", str(clones), "--out", str(tmp_path / "out"), "--tasks", "waste"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        photos.main()
    assert left.value.code == 1
    assert SOURCES["waste"].commit in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    build(clones, tmp_path / "own", ["waste"])
    monkeypatch.setattr(photo_sources, "PUBLISHED", tmp_path / "own" / "draw.json")
    photos.main()
    assert "not their very pictures" not in capsys.readouterr().out
    assert _stored(tmp_path / "out" / "waste") == _stored(tmp_path / "own" / "waste")


def test_the_published_draw_has_rows_for_every_task() -> None:
    assert PUBLISHED.stat().st_size < 30_000
    draw = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert list(draw) == list(SOURCES)
    for name, one in draw.items():
        rows = [row for split in SPLITS for row in one[split]]
        assert len(set(rows)) == len(rows), name
        assert set(one) == {"sha256", *SPLITS}


def test_what_is_not_the_source_is_refused(clones: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"git clone https://github.com/kaa/coins-dataset"):
        candidates(tmp_path, "coins")
    (tmp_path / "coins-dataset").mkdir()
    with pytest.raises(DataError, match=SOURCES["coins"].commit):
        candidates(tmp_path, "coins")
    build(clones, tmp_path / "waste", ["waste"])
    with pytest.raises(DataError, match="says nothing of coins"):
        build(clones, tmp_path / "x", ["coins"], json.loads((tmp_path / "waste" / "draw.json").read_text()))
    draw = json.loads((tmp_path / "waste" / "draw.json").read_text())["waste"]
    for wrong in ([99_999], [-99_999], draw["train"][::-1]):  # the last: files that are there, but not those drawn
        with pytest.raises(DataError, match=SOURCES["waste"].commit):
            build(clones, tmp_path / "x", ["waste"], {"waste": {**draw, "train": wrong}})
    with pytest.raises(ConfigurationError, match="rules is neither"):
        photos._read_draw(tmp_path / "rules")
    (tmp_path / "waste" / "waste").rename(tmp_path / "waste" / "coins")
    with pytest.raises(DataError, match="are not what kaa/coins-dataset gives"):
        build(clones, tmp_path / "x", ["coins"], tmp_path / "waste")


def test_files_that_occur_twice_count_once(clones: Path, tmp_path: Path) -> None:
    place = clones / "Trash-Classification-" / "dataset-resized"
    copy = place / "paper" / "paper999.jpg"
    copy.write_bytes((place / "glass" / "glass1.jpg").read_bytes())
    try:
        pictures = candidates(clones, "waste")
        twice = {row for row, one in enumerate(pictures) if one.path.name in ("paper999.jpg", "glass1.jpg")}
        photo_sources.MOST.update(train=99, validation=99, test=99)
        drawn = {row for rows in drawn_by_rule("waste", pictures).values() for row in rows}
        assert len(drawn) == len(pictures) - 1
        assert len(twice & drawn) == 1
    finally:
        copy.unlink()


def test_without_the_photographs_everything_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TASKRES_PHOTOS", str(tmp_path))
    with pytest.raises(ConfigurationError, match="--root CLONES"):
        photos.photo_tasks()
    monkeypatch.setattr(sys, "argv", ["results", "--only", "photos"])
    results.main()
    assert "Not measured: The photographs are not here" in capsys.readouterr().out
    (tmp_path / "tasks.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="no task 'cats'"):
        photos.photo_dataset("cats")
    monkeypatch.setenv("TASKRES_PHOTO_CLIP", str(tmp_path))
    assert "TASKRES_PHOTO_CLIP" in str(photos.missing())


# ---------------------------------------------------------------------- on the photographs themselves


def test_tasks_are_what_they_say(photo_folder: Path) -> None:
    for name, spec in photos.photo_tasks().items():
        opened = photos.photo_dataset(name)
        assert {split: len(part) for split, part in opened.items()} == spec["sizes"]
        assert opened["train"].features["label"].names == spec["classes"] == list(SOURCES[name].classes)
        assert spec["template"] == SOURCES[name].template


def test_sixteen_shots_beat_zero_shot_and_predictions_are_the_same_everywhere(
    photo_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec, opened = photos.photo_tasks()["waste"], photos.photo_dataset("waste")
    opened["test"] = opened["test"].select(range(120))
    model = TaskResCLIPForImageClassification.from_base(photos.photo_model_path(), spec["classes"], spec["template"])
    trainer = TaskResTrainer(
        model, TaskResTrainingArguments(shots=16, seed=1, disable_tqdm=True), opened["train"], opened["test"]
    )
    trainer.train()
    measured = trainer.measure()
    assert measured["accuracy"] > measured["zero_shot_accuracy"] + 0.15
    trainer.save_model(tmp_path / "waste")
    (tmp_path / "data").mkdir()
    opened["test"].to_parquet(tmp_path / "data" / "test.parquet")
    code, text, _ = run(
        capsys, "evaluate", tmp_path / "waste", tmp_path / "data", "--split", "test", "--json", "--quiet"
    )
    assert code == 0
    assert json.loads(text)["accuracy"] == pytest.approx(measured["accuracy"], abs=1e-6)
