"""Accepting an edit: said, checked, and never a change of what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import copied, run

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


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_an_old_format_gets_its_checksums(tmp_path: Path, base: str, version: str) -> None:
    folder = copied(Path(__file__).parents[1] / "golden" / version, tmp_path / "a")
    expected = Model.from_pretrained(folder, base_model=base).classifier.residual
    _edit(folder / "config.json", alpha=0.75)
    assert [(row["key"], row["before"], row["after"]) for row in sign(folder)] == [("alpha", 0.5, 0.75)]
    loaded = Model.from_pretrained(folder, base_model=base)
    assert loaded.classifier.residual.equal(expected)
    assert loaded.config.processor_sha256
