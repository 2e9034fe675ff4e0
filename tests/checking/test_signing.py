"""Accepting an edit: said, checked, and never a change of what was trained."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import copied, random_residual, run

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.checking import sign
from taskres_hf.errors import ArtifactError, TaskResError

Model = TaskResCLIPForImageClassification


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return copied(trained, tmp_path / "a")


def _edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_an_edit_is_accepted_and_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit(folder / "config.json", alpha=0.75)
    _edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(ArtifactError, match="taskres sign"):
        Model.from_pretrained(folder)
    code, text, _ = run(capsys, "sign", folder)
    assert code == 0
    assert "config.json: alpha 0.5 -> 0.75" in text
    assert "preprocessor_config.json: image_mean" in text
    loaded = Model.from_pretrained(folder)
    assert loaded.classifier.alpha == 0.75
    assert list(loaded.image_processor.image_mean) == [0.5, 0.5, 0.5]
    assert sign(folder) == []


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("config.json", {"alpha": "much"}), ("config.json", {"id2label": {"0": "wolf"}}),
        ("config.json", {"templates": ["a sketch of a {}."]}), ("config.json", {"projection_dim": 3}),
        ("config.json", {"format_version": 99}), ("preprocessor_config.json", {"image_mean": "grey"}),
        ("preprocessor_config.json", {"image_std": [0.0, 0.0, 0.0]}),
        ("preprocessor_config.json", {"image_processor_type": "Nothing"}),
    ],
)  # fmt: skip
def test_what_would_not_load_is_not_signed(folder: Path, file: str, values: dict[str, Any]) -> None:
    _edit(folder / file, **values)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TaskResError):
        sign(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_tensors_are_never_signed(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        sign(folder)


def test_a_config_of_other_tensors_is_not_signed(model: Model, folder: Path, tmp_path: Path) -> None:
    random_residual(model).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", folder)
    with pytest.raises(ArtifactError, match="of other tensors"):
        sign(folder)


@pytest.mark.parametrize("cut", ["preprocessor_config.json", "config.json"])
def test_a_save_that_was_cut_is_completed(
    model: Model, folder: Path, tmp_path: Path, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the save was to replace is no edit to accept."""
    random_residual(model)
    model.classifier.alpha = 0.75
    model.image_processor.image_mean = [0.25, 0.25, 0.25]
    real = os.replace

    def stop(source: Path, target: Path) -> None:
        if Path(target) == folder / cut:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
    assert sign(folder) == []
    model.save_pretrained(tmp_path / "whole")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        found, whole = (json.loads(_text(place / name)) for place in (folder, tmp_path / "whole"))
        assert found == whole


def _text(file: Path) -> str:
    """JSON of a file; of weights their header."""
    content = file.read_bytes()
    return (content[8 : 8 + int.from_bytes(content[:8], "little")] if file.suffix != ".json" else content).decode()


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_an_old_format_gets_its_checksums(tmp_path: Path, base: str, version: str) -> None:
    folder = copied(Path(__file__).parents[1] / "golden" / version, tmp_path / "a")
    expected = Model.from_pretrained(folder, base_model=base).classifier.residual
    _edit(folder / "config.json", alpha=0.75)
    assert [(row["key"], row["before"], row["after"]) for row in sign(folder)] == [("alpha", 0.5, 0.75)]
    loaded = Model.from_pretrained(folder, base_model=base)
    assert loaded.classifier.residual.equal(expected)
    assert loaded.config.processor_sha256
