"""`taskres suggest`, as a user meets it, from no label at all to a second round."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import run

from taskres_hf.analysis.labelling import STRATEGIES
from taskres_hf.analysis.suggesting import suggest_pictures
from taskres_hf.cli.suggest import StrategyName
from taskres_hf.demo import demo_dataset
from taskres_hf.errors import ConfigurationError, DataError
from taskres_hf.modeling_taskres import TaskResCLIPForImageClassification

NAMES = ["zero", "one", "seven"]
COLD = ["--class-names", ",".join(NAMES), "--base-model", "shipped", "-q"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight pictures each in one folder, one of them twice under a hostile name, and a broken one."""
    here, rows = tmp_path_factory.mktemp("world"), demo_dataset("digits")["train"]
    (here / "pool").mkdir()
    for name, label in zip(NAMES, (0, 1, 7), strict=True):
        for number, row in enumerate([row for row in rows if row["label"] == label][:8]):
            row["image"].convert("RGB").save(here / "pool" / f"{name}-{number}.png")
    (here / "pool" / "=1+1.png").write_bytes((here / "pool" / "one-0.png").read_bytes())
    (here / "pool" / "broken.png").write_bytes(b"no picture")
    return here


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def _read(table: str | Path) -> list[dict[str, str]]:
    with open(table, newline="") as stream:
        return list(csv.DictReader(stream))


def _filled_in(table: Path, to: Path, keep: int = 100) -> int:
    """Do a person's work: the file's name says the label; the last rows stay empty. The number of labels."""
    rows = _read(table)
    for row in rows[:keep]:
        row["label"] = Path(row["file"]).name.split("-")[0].replace("=1+1.png", "one")
    with to.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return sum(bool(row["label"]) for row in rows)


def test_from_no_label_to_a_second_round(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, error = run(capsys, "suggest", "pool", *COLD, "-n", 7, "-o", "first.csv")
    assert code == 3
    assert "broken.png" in error
    assert "--drop-unlabelled" in text
    rows = _read("first.csv")
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 8)]
    assert all(not row["label"] and row["suggested"] in NAMES and row["reason"] for row in rows)
    assert len({row["file"] for row in rows}) == 7
    assert _filled_in(here / "first.csv", here / "labels.csv", keep=6) == 6
    options = ["--drop-unlabelled", "--on-short", "ignore", "--folds", 0]
    assert run(capsys, "train", "labels.csv", *COLD, *options, "-o", "c")[0] == 0
    code, text, _ = run(
        capsys, "suggest", "c", "pool", "-q", "-n", 4, "--labelled", "labels.csv", "-o", "second.csv",
        "--allow-skipped",
    )  # fmt: skip
    assert code == 0
    second = _read("second.csv")
    old, new = second[:6], second[6:]
    assert {(row["file"], row["label"]) for row in old} == {
        (row["file"], row["label"]) for row in _read("labels.csv") if row["label"]
    }
    assert len(new) == 4
    assert not {row["file"] for row in new} & {row["file"] for row in old}
    assert run(capsys, "train", "second.csv", "--from", "c", "-q", *options, "-o", "again")[0] == 0


def test_pictures_trained_on_are_known_by_content(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        (here / "few" / name).mkdir(parents=True, exist_ok=True)
        for number in range(2):
            (here / "few" / name / f"{number}.png").write_bytes((here / "pool" / f"{name}-{number}.png").read_bytes())
    assert run(capsys, "train", "few", "--base-model", "shipped", "-q", "--folds", 0, "-o", "known")[0] == 0
    code, text, _ = run(capsys, "suggest", "known", "pool", "-n", 100, "--json")
    assert code == 3
    found = json.loads(text)
    assert found["already_labelled"] == 7  # one of them is there twice
    shown = {Path(row["file"]).name for row in found["pictures"]}
    assert not shown & {f"{name}-{number}.png" for name in NAMES for number in range(2)}
    assert "=1+1.png" not in shown
    assert {row["class"] for row in found["classes"]} == set(NAMES)
    assert len(found["skipped"]) == 1


def test_a_hostile_name_is_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "odd").mkdir(exist_ok=True)
    for name in ("=1+1.png", "<script>.png", "-x.png"):
        number = len(list((here / "odd").iterdir()))
        (here / "odd" / name).write_bytes((here / "pool" / f"seven-{number}.png").read_bytes())
    assert run(capsys, "suggest", "odd", *COLD, "-o", "odd/t.csv")[0] == 0
    rows = _read("odd/t.csv")
    assert {row["file"] for row in rows} == {"./=1+1.png", "<script>.png", "./-x.png"}
    for number, row in enumerate(rows):
        row["label"] = NAMES[number]
    Path("odd/t.jsonl").write_text("\n".join(json.dumps({"file": r["file"], "label": r["label"]}) for r in rows))
    assert run(capsys, "train", "odd/t.jsonl", "--base-model", "shipped", "-q", "--folds", 0, "-o", "odd/c")[0] == 0


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_formats_hold_the_same(here: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    assert run(capsys, "suggest", "pool", *COLD, "-n", 3, "-o", f"t.{ending}", "--allow-skipped")[0] == 0
    if ending == "parquet":
        rows = pq.read_table("t.parquet").to_pylist()
    else:
        rows = [json.loads(line) for line in Path("t.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert all(row["label"] is None and 0 < row["probability"] <= 1 for row in rows)


def test_what_is_wrong_is_said_before_any_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, message in (
        (["pool", "-q"], 2, "give a classifier and pictures"),
        (["c", "pool", "--template", "a {}"], 2, "has its own"),
        (["pool", *COLD, "-o", "t.xlsx"], 1, "end its name in"),
        (["nowhere", *COLD], 1, "nowhere"),
        (["pool", *COLD, "-n", "0"], 2, "-n"),
        (["pool", *COLD, "--strategy", "best"], 2, "best"),
    ):
        found, _, error = run(capsys, "suggest", *arguments)
        assert found == code, arguments
        assert message in " ".join(error.split())


def test_the_same_seed_suggests_the_same(here: Path, base: str) -> None:
    model = TaskResCLIPForImageClassification.from_base(base, NAMES)
    for strategy in STRATEGIES:
        found, again = (suggest_pictures(model, "pool", 5, strategy=strategy, seed=3).pictures for _ in range(2))
        assert found == again
        assert len({row["file"] for row in found}) == 5


def test_all_labelled_or_several_labels_are_refused(here: Path, base: str) -> None:
    for name in NAMES[:2]:
        (here / "done" / name).mkdir(parents=True)
        (here / "done" / name / "0.png").write_bytes((here / "pool" / f"{name}-0.png").read_bytes())
    model = TaskResCLIPForImageClassification.from_base(base, NAMES)
    with pytest.raises(DataError, match="labelled already"):
        suggest_pictures(model, "pool/zero-0.png", labelled="done")
    several = TaskResCLIPForImageClassification.from_base(base, NAMES, problem_type="multi_label_classification")
    with pytest.raises(ConfigurationError, match="several labels"):
        suggest_pictures(several, "pool")


def test_every_strategy_has_its_option() -> None:
    assert [str(choice) for choice in StrategyName] == list(STRATEGIES)
