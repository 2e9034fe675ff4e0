"""The saved folder: what is in it, what a crash leaves."""

from __future__ import annotations

import json
import os
import resource
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support import copied, random_residual

from taskres_hf import TaskResCLIPForImageClassification, artifact
from taskres_hf.artifact import read_artifact, write_artifact
from taskres_hf.errors import ArtifactError

Model = TaskResCLIPForImageClassification
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}


def _config(classes: int = 100, dim: int = 512) -> dict[str, object]:
    return {
        "model_type": "taskres", "base_model_name_or_path": "some/base", "projection_dim": dim, "alpha": 0.5,
        "base_fingerprint": {"shape": [classes, dim]}, "logit_scale": 100.0,
        "id2label": {str(index): f"class {index}" for index in range(classes)},
    }  # fmt: skip


def test_files_and_their_content(trained: Path) -> None:
    assert {file.name for file in trained.iterdir()} == FILES
    with safe_open(trained / "model.safetensors", framework="pt") as stream:
        assert sorted(stream.keys()) == ["class_bias", "residual"]
        assert stream.get_tensor("residual").shape == (8, 192)
        assert stream.get_tensor("residual").dtype == torch.float32
    config = json.loads((trained / "config.json").read_text())
    assert config["model_type"] == "taskres"
    assert "adapter_config.json" not in {file.name for file in trained.iterdir()}
    text = (trained / "config.json").read_text() + (trained / "README.md").read_text()
    assert os.environ["HF_TOKEN"] not in text


def test_a_hundred_classes_take_less_than_300_kb(base: str, tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", _config(), {"residual": torch.randn(100, 512)}, {"README.md": b"x" * 5000})
    assert sum(file.stat().st_size for file in (tmp_path / "a").iterdir()) < 300_000


def test_permissions_are_the_users(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_artifact(tmp_path / "a", _config(2, 3), {"residual": torch.zeros(2, 3)}, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o750
    for file in (tmp_path / "a").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_saving_again_keeps_other_files_and_a_written_card(model: Model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("My own words.")
    (tmp_path / "notes.txt").write_text("keep me")
    random_residual(model).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "My own words."
    assert (tmp_path / "notes.txt").read_text() == "keep me"
    assert torch.equal(Model.from_pretrained(tmp_path).classifier.residual, model.classifier.residual)


def test_another_models_config_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ArtifactError, match="another model"):
        write_artifact(tmp_path, _config(2, 3), {"residual": torch.zeros(2, 3)}, {})
    assert (tmp_path / "config.json").read_text() == '{"model_type": "clip"}'


def test_a_crash_between_the_files_is_healed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old, new = torch.zeros(2, 3), torch.ones(2, 3)
    write_artifact(tmp_path, {**_config(2, 3), "alpha": 0.5}, {"residual": old}, {})
    real = os.replace

    def stop_at_config(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "config.json":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(artifact.os, "replace", stop_at_config)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path, {**_config(2, 3), "alpha": 0.9}, {"residual": new}, {})
    config, tensors, _ = read_artifact(tmp_path / "config.json", tmp_path / "model.safetensors")
    assert torch.equal(tensors["residual"], new)
    assert config["alpha"] == 0.9


def test_a_crash_before_the_weights_leaves_the_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_artifact(tmp_path, _config(2, 3), {"residual": torch.zeros(2, 3)}, {})

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "write_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path, _config(2, 3), {"residual": torch.ones(2, 3)}, {"README.md": b"new"})
    _, tensors, _ = read_artifact(tmp_path / "config.json", tmp_path / "model.safetensors")
    assert not tensors["residual"].any()


def test_a_new_folder_appears_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object) -> None:
        raise ArtifactError("disk full")

    monkeypatch.setattr(artifact, "write_tensors", fail)
    with pytest.raises(ArtifactError):
        write_artifact(tmp_path / "new", _config(2, 3), {"residual": torch.ones(2, 3)}, {"README.md": b"text"})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_artifact(tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", _config(2, 3), {"residual": torch.zeros(2, 3)}, {})
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(ArtifactError, match="Nothing was changed"):
            write_artifact(tmp_path / "a", _config(50, 512), {"residual": torch.ones(50, 512)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="file"):
        write_artifact(tmp_path / "file", _config(2, 3), {"residual": torch.zeros(2, 3)}, {})
    with pytest.raises(ArtifactError, match="Cannot write"):
        write_artifact(tmp_path / "file" / "below", _config(2, 3), {"residual": torch.zeros(2, 3)}, {})


def test_nan_is_refused_on_saving(model: Model, trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    with torch.no_grad():
        model.classifier.residual[3, 5] = float("nan")
    with pytest.raises(ArtifactError, match="NaN or infinite values in 1 of 8"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
