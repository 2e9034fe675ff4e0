"""`taskres classes`, `taskres merge` and `taskres train --from`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import copied, run

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.cli.run_config import RUN_FILE, write_run


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, text, error = run(capsys, *arguments, "--json")
    assert code == 0, text + error
    value: dict[str, Any] = json.loads(text)
    return value


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, _, error = run(capsys, *arguments)
    assert code == 1
    return error


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_listing(capsys: pytest.CaptureFixture[str], trained: Path, spec: Any) -> None:
    assert _json(capsys, "classes", trained)["classes"] == spec["classes"]
    code, text, _ = run(capsys, "classes", trained)
    assert code == 0
    assert all(name in text for name in spec["classes"])


def test_all_changes_at_once(capsys: pytest.CaptureFixture[str], trained: Path, spec: Any, tmp_path: Path) -> None:
    before, names = _files(trained), spec["classes"]
    order = tmp_path / "order.txt"
    hostile = "<script>=cmd()"
    order.write_text("\n".join(["tractor", hostile, *names[2:]]))
    out = tmp_path / "out"
    result = _json(
        capsys, "classes", trained, "--rename", f"{names[0]}={hostile}", "--remove", names[1], "--add", "tractor",
        "--order", order, "-o", out,
    )  # fmt: skip
    assert result["classes"] == ["tractor", hostile, *names[2:]]
    assert len(result["changes"]) == 4
    assert Model.from_pretrained(out).class_names == result["classes"]
    assert _files(trained) == before
    assert run(capsys, "verify", out)[0] == 0
    assert _json(capsys, "info", out)["changes"] == result["changes"]
    assert _json(capsys, "classes", out)["changes"] == result["changes"]


def test_the_input_is_changed_only_when_asked(
    capsys: pytest.CaptureFixture[str], trained: Path, spec: Any, tmp_path: Path
) -> None:
    own = copied(trained, tmp_path / "own")
    before, name = _files(own), spec["classes"][0]
    assert "-o" in _refused(capsys, "classes", own, "--remove", name)
    assert "--overwrite" in _refused(capsys, "classes", own, "--remove", name, "-o", own)
    assert "did you mean" in _refused(capsys, "classes", own, "--remove", name + "s", "-o", own, "--overwrite")
    assert "ways" in _refused(capsys, "classes", own, "--rename", "mammal", "-o", tmp_path / "x")
    assert "--add" in _refused(capsys, "classes", own, "--dataset", "photos")
    assert "--rename" in _refused(capsys, "classes", own, "--reembed")
    assert "what to change" in _refused(capsys, "classes", own, "-o", tmp_path / "x")
    assert _files(own) == before
    assert not (tmp_path / "x").exists()
    code, text, _ = run(capsys, "classes", own, "--remove", name, "--overwrite")
    assert code == 0
    assert f"removed {name}" in text
    assert name not in Model.from_pretrained(own).class_names


def test_merging(capsys: pytest.CaptureFixture[str], trained: Path, spec: Any, tmp_path: Path) -> None:
    names, both = spec["classes"], tmp_path / "both"
    merged = _json(capsys, "merge", trained, trained, "-o", both, "--weights", "0.7,0.3")
    assert merged["classes"] == names
    for folder, dropped in (("a", names[:4]), ("b", names[4:])):
        removals = [part for name in dropped for part in ("--remove", name)]
        _json(capsys, "classes", trained, *removals, "-o", tmp_path / folder)
    parts = tmp_path / "a", tmp_path / "b"
    assert "--union" in _refused(capsys, "merge", *parts, "-o", tmp_path / "x")
    assert "leave one out" in _refused(capsys, "merge", *parts, "--union", "--weights", "1,1", "-o", tmp_path / "x")
    assert "--weights" in _refused(capsys, "merge", trained, trained, "--weights", "a,b", "-o", tmp_path / "x")
    assert "two" in _refused(capsys, "merge", trained, "-o", tmp_path / "x")
    assert "already holds" in _refused(capsys, "merge", trained, trained, "-o", both)
    assert not (tmp_path / "x").exists()
    united = _json(capsys, "merge", *parts, "--union", "-o", tmp_path / "united")
    assert united["classes"] == [*names[4:], *names[:4]]
    assert run(capsys, "verify", tmp_path / "united")[0] == 0


def test_settings_of_a_run_do_not_stay_beside_another_classifier(
    capsys: pytest.CaptureFixture[str], trained: Path, spec: Any, tmp_path: Path
) -> None:
    """`taskres train --config` with them would give the classifier of before."""
    own = copied(trained, tmp_path / "own")
    write_run(own, {"dataset": "photos", "shots": 4})
    _json(capsys, "classes", own, "--remove", spec["classes"][0], "--overwrite")
    assert not (own / RUN_FILE).exists()
    (own / RUN_FILE).write_text("dataset: of mine\n")
    _json(capsys, "merge", own, own, "-o", own, "--overwrite")
    assert (own / RUN_FILE).read_text() == "dataset: of mine\n"


@pytest.mark.filterwarnings("ignore")
def test_adding_with_pictures_and_training_on(
    capsys: pytest.CaptureFixture[str], trained: Path, splits: Any, spec: Any, tmp_path: Path
) -> None:
    names, photos = spec["classes"], tmp_path / "photos"
    for label in (6, 7):
        folder = photos / names[label]
        folder.mkdir(parents=True)
        rows = [row for row in splits["train"] if row["label"] == label][:4]
        for number, row in enumerate(rows):
            row["image"].convert("RGB").save(folder / f"{number}.png")
    removals = [part for name in names[6:] for part in ("--remove", name)]
    _json(capsys, "classes", trained, *removals, "-o", tmp_path / "six")
    adds = [part for name in names[6:] for part in ("--add", name)]
    added = _json(capsys, "classes", tmp_path / "six", *adds, "--dataset", photos, "-o", tmp_path / "eight")
    assert "from 8 pictures" in added["changes"][-1]
    told = _refused(capsys, "train", photos, "--from", trained, "--template", "a {}", "-o", tmp_path / "on")
    assert "--from takes prompts" in told
    on = tmp_path / "on"
    options = ("--recipe", "auto-v1", "--epochs", 2, "--on-short", "ignore", "--folds", 0)
    result = _json(capsys, "train", photos, "--from", trained, *options, "-o", on)
    assert result["classes"] == len(names)
    assert str(trained) in (on / "run.yaml").read_text()
    assert _json(capsys, "train", "--config", on / "run.yaml", "-o", tmp_path / "again", "--folds", 0)["classes"] == 8
