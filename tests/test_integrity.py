"""Damage and edits: whatever changed after a save is noticed, and what cannot be is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import copied, golden_v3

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.errors import ArtifactError

Model = TaskResCLIPForImageClassification


def _load(folder: Path) -> None:
    Model.from_pretrained(folder)


@pytest.fixture
def newest(model: Model, tmp_path: Path) -> Path:
    return golden_v3(model, tmp_path / "newest")


@pytest.mark.parametrize("keep", [0, 4, 100, 6000])
def test_truncated_weights(trained: Path, tmp_path: Path, keep: int) -> None:
    folder = copied(trained, tmp_path / "a")
    (folder / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged"):
        _load(folder)


def test_a_flipped_bit(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        _load(folder)


def test_a_pickle_is_never_opened(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises((ArtifactError, OSError), match=r"model\.safetensors"):
        _load(folder)


@pytest.mark.parametrize("change", ["changed", "left out"])
def test_the_checksum_covers_the_bias(newest: Path, change: str) -> None:
    tensors = load_file(newest / "model.safetensors")
    bias = tensors.pop("class_bias")
    save_file(tensors if change == "left out" else {**tensors, "class_bias": bias + 1}, newest / "model.safetensors")
    with pytest.raises(ArtifactError, match="checksum"):
        _load(newest)
