"""The saved folder: what is in it, what a crash leaves, what damage is noticed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import random_residual
from transformers import AutoModelForImageClassification

from taskres_hf import TaskResCLIPForImageClassification, artifact
from taskres_hf.artifact import read_artifact, write_artifact
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError, TaskResError

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
        assert list(stream.keys()) == ["residual"]
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


# ---------------------------------------------------------------------- crashes


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
    config, tensors = read_artifact(tmp_path / "config.json", tmp_path / "model.safetensors")
    assert torch.equal(tensors["residual"], new)
    assert config["alpha"] == 0.9


def test_a_crash_before_the_weights_leaves_the_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_artifact(tmp_path, _config(2, 3), {"residual": torch.zeros(2, 3)}, {})

    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "write_tensors", fail)
    with pytest.raises(KeyboardInterrupt):
        write_artifact(tmp_path, _config(2, 3), {"residual": torch.ones(2, 3)}, {"README.md": b"new"})
    _, tensors = read_artifact(tmp_path / "config.json", tmp_path / "model.safetensors")
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


# ---------------------------------------------------------------------- damage


def _copy(trained: Path, to: Path) -> Path:
    to.mkdir()
    for file in trained.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def _load(folder: Path) -> None:
    Model.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 6000])
def test_truncated_weights(trained: Path, tmp_path: Path, keep: int) -> None:
    folder = _copy(trained, tmp_path / "a")
    (folder / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged"):
        _load(folder)


def test_a_flipped_bit(trained: Path, tmp_path: Path) -> None:
    folder = _copy(trained, tmp_path / "a")
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        _load(folder)


def test_a_pickle_is_never_opened(trained: Path, tmp_path: Path) -> None:
    folder = _copy(trained, tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises((ArtifactError, OSError), match=r"model\.safetensors"):
        _load(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"residual": torch.zeros(7, 192)}, r"\[7, 192\]"),
        ({"residual": torch.zeros(8, 100)}, "do not belong together"),
        ({"residual": torch.full((8, 192), float("nan"))}, "NaN"),
        ({"residual": torch.zeros(8, 192, dtype=torch.int64)}, "floating-point"),
        ({"weight": torch.zeros(8, 192)}, "exactly one tensor"),
        ({"residual": torch.zeros(8, 192), "more": torch.zeros(1)}, "exactly one tensor"),
    ],
)
def test_wrong_tensors(trained: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    folder = _copy(trained, tmp_path / "a")
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["residual_sha256"]  # the checksum alone would refuse it
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        _load(folder)


@pytest.mark.parametrize("key", ["base_fingerprint", "projection_dim", "id2label", "base_model_name_or_path"])
def test_missing_config_keys(trained: Path, tmp_path: Path, key: str) -> None:
    folder = _copy(trained, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=key):
        _load(folder)


def test_newer_format_and_broken_json(trained: Path, tmp_path: Path) -> None:
    folder = _copy(trained, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 4}))
    with pytest.raises(ArtifactError, match="upgrade"):
        _load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="JSON"):
        _load(folder)


def test_nan_is_refused_on_saving(model: Model, trained: Path, tmp_path: Path) -> None:
    folder = _copy(trained, tmp_path / "a")
    with torch.no_grad():
        model.classifier.residual[3, 5] = float("nan")
    with pytest.raises(ArtifactError, match="NaN or infinite values in 1 of 8"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_describe(trained: Path) -> None:
    facts = describe(trained)
    assert facts["num_classes"] == 8
    assert facts["shots"] == 4
    assert facts["residual"]["shape"] == [8, 192]
    assert facts["engine"] == "torch-fp32"
    assert 0 < facts["zero_shot_accuracy"] < 1
    assert set(facts["bytes"]) == FILES
    assert "torch" in facts["library_versions"]
    with pytest.raises(ArtifactError, match="no-such"):
        describe(trained.parent / "no-such")


def test_describing_needs_no_torch(trained: Path) -> None:
    code = """
import sys, json
from taskres_hf.errors import ArtifactError, TaskResError
from taskres_hf.description import describe
facts = describe(sys.argv[1])
try:
    describe(sys.argv[2])
except ArtifactError as error:
    facts = [facts, str(error)]
heavy = {"torch", "transformers", "datasets", "tokenizers", "sklearn", "pandas"}
print(json.dumps([facts, sorted(heavy & set(sys.modules))]))
"""
    flipped = _copy(trained, trained.parent / "flipped")
    content = bytearray((trained / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (flipped / "model.safetensors").write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", code, str(trained), str(flipped)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (facts, error), loaded = json.loads(done.stdout)
    assert loaded == []
    assert "checksum" in error
    assert facts == json.loads(json.dumps(describe(trained)))
    residual = Model.from_pretrained(trained).classifier.residual.detach()
    assert facts["residual"]["mean_length"] == pytest.approx(float(residual.norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("id2label", {"1": "a", "2": "b"}), ("id2label", []), ("alpha", "0.5"), ("alpha", True), ("alpha", None),
        ("projection_dim", 192.0), ("templates", "a {}."), ("templates", [3]), ("class_descriptions", {"mammal": 3}),
        ("base_fingerprint", {"sketch": ["x"]}), ("base_fingerprint", {"image": 3}), ("logit_scale", [1]),
        ("data", []), ("few_shot", "x"), ("metrics", 3), ("format_version", "2"), ("base_model_name_or_path", 3),
    ],
)  # fmt: skip
def test_a_config_with_a_wrong_value(trained: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = _copy(trained, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(TaskResError):
        _load(folder)


def test_golden_artifact_of_the_second_format(base: str, model: Model) -> None:
    """An enhanced base, fp16, and the sketch of the image tower."""
    loaded = Model.from_pretrained(Path(__file__).parent / "golden" / "v2", base_model=base)
    assert loaded.config.format_version == 2
    assert loaded.class_names == model.class_names
    assert loaded.config.base_fingerprint["image"]["weights"] == 104
    assert float(loaded.classifier.weight().detach().norm()) == pytest.approx(35.0396, abs=1e-3)


def test_an_old_artifact_is_saved_anew_in_the_newest_format(base: str, tmp_path: Path) -> None:
    loaded = Model.from_pretrained(Path(__file__).parent / "golden" / "v1", base_model=base)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    assert torch.equal(Model.from_pretrained(tmp_path, base_model=base).classifier.residual, loaded.classifier.residual)


def test_golden_artifact_of_the_first_format(model: Model) -> None:
    """A folder written by version 0.1.0 loads for ever."""
    golden = Path(__file__).parent / "golden" / "v1"
    loaded = Model.from_pretrained(golden, base_model=str(model.config.base_model_name_or_path))
    assert loaded.class_names == model.class_names
    assert float(loaded.classifier.residual.detach().norm()) == pytest.approx(40.3145, abs=1e-3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "x"), ("dtype", []), ("format_version", True), ("format_version", 0), ("templates", 3),
        ("base_fingerprint.shape", -1), ("base_fingerprint.shape", {"a": 1}), ("base_fingerprint.dtype", []),
        ("id2label", ["a"]), ("id2label", {"a": 1}),
    ],
)  # fmt: skip
def test_values_of_another_type_are_errors_of_ours(trained: Path, tmp_path: Path, key: str, value: Any) -> None:
    shutil.copytree(trained, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    *outer, last = key.split(".")
    (config[outer[0]] if outer else config)[last] = value
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    for loader in (Model, AutoModelForImageClassification):
        with pytest.raises(TaskResError):
            loader.from_pretrained(tmp_path / "a")
