"""One table of several classifiers: a row for each picture and classifier, whole or absent, resumed exactly."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from taskres_hf import ClassifierPool
from taskres_hf.demo import demo_dataset
from taskres_hf.errors import ConfigurationError
from taskres_hf.pool import answering
from taskres_hf.predicting import classify_to_file

NAMES = ["pair", "many", "image-side"]


@pytest.fixture(scope="module")
def pool(folders: Path) -> ClassifierPool:
    return ClassifierPool.from_folders(folders)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Seven pictures, the third of which is none; one whose name is a formula."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = demo_dataset("food")["test"]
    found = [folder / f"{number}.png" for number in range(6)] + [folder / "=cmd()<script>.png"]
    for number, file in enumerate(found):
        rows[number]["image"].convert("RGB").save(file)
    found[2].write_bytes(b"none")
    return found


def _csv(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def test_a_row_for_each_picture_and_classifier(
    pool: ClassifierPool, models: dict[str, Any], files: list[Path], tmp_path: Path
) -> None:
    written = pool.classify_to_file(files, tmp_path / "rows.csv", NAMES, top_k=3)
    assert (written.classified, len(written.skipped), written.resumed) == (6, 1, 0)
    head, *rows = _csv(tmp_path / "rows.csv")
    assert head == ["file", "classifier", "label", "score", "label_2", "score_2", "label_3", "score_3", "error"]
    assert [row[1] for row in rows] == NAMES * len(files)
    assert {len(row) for row in rows} == {len(head)}
    assert rows[-1][0] == str(files[-1])
    for place, name in enumerate(NAMES):
        classify_to_file(models[name], files, tmp_path / "alone.csv", top_k=3)
        alone = _csv(tmp_path / "alone.csv")[1:]
        for ours, own in zip(rows[place::3], alone, strict=True):
            filled = [*own[1:-1], *[""] * (6 - len(own[1:-1]))]
            assert [ours[0], ours[2::2]] == [own[0], [*filled[::2], own[-1]]]
            assert [float(cell or 0) for cell in ours[3:-1:2]] == pytest.approx(
                [float(cell or 0) for cell in filled[1::2]], abs=1e-4
            )
    assert "2.png" in rows[6][-1]
    assert rows[6][2:-1] == [""] * 6


def test_json_lines_and_parquet_hold_the_same(pool: ClassifierPool, files: list[Path], tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet"):
        pool.classify_to_file([str(file) for file in files], tmp_path / f"rows.{kind}", ["pair", "many"])
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert list(lines[0]) == ["file", "classifier", "predictions", "error"]
    assert list(table[0]) == ["file", "classifier", "labels", "scores", "error"]
    assert [(row["file"], row["classifier"], [top["label"] for top in row["predictions"]]) for row in lines] == [
        (row["file"], row["classifier"], row["labels"]) for row in table
    ]
    assert [len(row["labels"]) for row in table] == [1, 1, 1, 1, 0, 0, *[1] * 8]


def test_several_labels_share_a_cell(pool: ClassifierPool, files: list[Path], tmp_path: Path) -> None:
    pool.classify_to_file(files, tmp_path / "rows.csv", ["tags", "pair"])
    head, *rows = _csv(tmp_path / "rows.csv")
    assert head == ["file", "classifier", "labels", "scores", "error"]
    assert any("|" in row[2] for row in rows[::2])
    assert not any("|" in row[2] for row in rows[1::2])
    pool.classify_to_file(files, tmp_path / "two.csv", ["tags", "pair"], top_k=2)
    assert _csv(tmp_path / "two.csv")[0][2:4] == ["label", "score"]


def test_a_run_that_was_stopped_goes_on_and_gives_the_very_file(
    pool: ClassifierPool, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "rows.csv"
    pool.classify_to_file(files, whole, NAMES, batch_size=2)
    by_file = answering.by_file

    def stopped(*arguments: Any) -> Iterator[Any]:
        for number, row in enumerate(by_file(*arguments)):
            if number == 5:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(answering, "by_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            pool.classify_to_file(files, output, NAMES, batch_size=2)
    assert not output.exists()
    with pytest.raises(ConfigurationError, match="holds 5 rows of a run that was stopped"):
        pool.classify_to_file(files, output, NAMES, batch_size=2)
    for other in ({"names": NAMES[:2]}, {"top_k": 2}, {"batch_size": 3}):
        with pytest.raises(ConfigurationError, match="was begun with other"):
            pool.classify_to_file(files, output, **{"names": NAMES, "batch_size": 2, **other}, resume=True)
    before = os.stat(files[0])
    os.utime(files[0], ns=(0, 0))
    with pytest.raises(ConfigurationError, match="was begun with other files, sizes or times of files"):
        pool.classify_to_file(files, output, NAMES, batch_size=2, resume=True)
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    written = pool.classify_to_file(files, output, NAMES, batch_size=2, resume=True)
    assert written.resumed == 4
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.csv", "whole.csv"]


def test_what_cannot_be_is_said_before_pictures_are_read(pool: ClassifierPool, tmp_path: Path, folders: Path) -> None:
    for output, names, message in (
        ("rows.txt", None, "Cannot tell the format"), ("no/rows.csv", None, "There is no folder"),
        ("rows.csv", ["dogs"], "no classifier 'dogs'"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=message):
            pool.classify_to_file([tmp_path / "missing.png"], tmp_path / output, names)
    assert not list(tmp_path.iterdir())


def test_a_pool_at_another_strength(folders: Path, files: list[Path], models: dict[str, Any]) -> None:
    plain = ClassifierPool.from_folders(folders).embed(files[:2])
    zero = ClassifierPool(classifiers=[folders / "pair", folders / "half"], strength=0.0)
    for name in zero:
        wanted = models[name].classifier.zero_shot_logits(plain)
        assert zero.logits(plain)[name].sub(wanted).abs().max() < 1e-4
    with pytest.raises(ConfigurationError, match="strength"):
        zero.add("tags", folders / "tags")
    with pytest.raises(ConfigurationError, match="from 0 to 1"):
        ClassifierPool(classifiers=[folders / "pair"], strength=2.0)
