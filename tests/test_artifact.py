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
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_old_formats_give_the_answers_they_gave_bit_for_bit(base: str, version: str) -> None:
    head = Model.from_pretrained(GOLDEN / version, base_model=base).classifier
    tensors = load_file(GOLDEN / version / "model.safetensors")
    frozen = head.base + tensors["base_shift"].float() if version == "v2" else head.base
    weight = frozen + 0.5 * tensors["residual"].float()
    images = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    cosine = head.logit_scale * F.normalize(images, dim=-1) @ F.normalize(weight, dim=-1).T
    assert torch.equal(head(images), cosine + head.logit_bias)


def golden_v3(model: Model, folder: Path) -> Path:
    """How the golden artifact of the third format was made; the base's name was shortened afterwards."""
    rows = torch.sin(torch.arange(8 * 192, dtype=torch.float64)).reshape(8, 192) * torch.arange(1, 9)[:, None] / 20
    bias = torch.linspace(-2, 2, 8)
    model.classifier.set_weight(rows, class_bias=bias, normalize_weight=False, logit_scale_factor=0.75)
    model.config.training = {"method": "linear-probe"}
    model.strength = 0.625
    model.save_pretrained(folder)
    return folder


def test_golden_artifact_of_the_third_format(base: str, model: Model, tmp_path: Path) -> None:
    """Lengths of its own, a class bias, a factor and a strength."""
    head = Model.from_pretrained(GOLDEN / "v3", base_model=base).classifier
    images = torch.randn(32, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.sin(torch.arange(8 * 192, dtype=torch.float64)).reshape(8, 192) * torch.arange(1, 9)[:, None] / 20
    between = 0.375 * F.normalize(head.base.double(), dim=1) + 0.625 * rows
    cosine = F.normalize(images, dim=1) @ between.T
    expected = head.logit_scale * 0.75**0.625 * cosine + 0.625 * torch.linspace(-2, 2, 8)
    torch.testing.assert_close(head(images.float()).double(), expected, atol=1e-3, rtol=1e-4)
    facts, anew = describe(GOLDEN / "v3"), describe(golden_v3(model, tmp_path / "v3"))
    for key in ("format_version", "strength", "normalize_weight", "logit_scale_factor", "class_bias", "method"):
        assert facts[key] == anew[key]
    assert (facts["format_version"], facts["strength"], facts["class_bias"]) == (3, 0.625, True)
    for name, tensor in load_file(GOLDEN / "v3" / "model.safetensors").items():
        torch.testing.assert_close(tensor, load_file(tmp_path / "v3" / "model.safetensors")[name], atol=1e-3, rtol=1e-3)


def test_golden_artifact_of_the_second_format(base: str, model: Model) -> None:
    """An enhanced base, fp16, and the sketch of the image tower."""
    loaded = Model.from_pretrained(GOLDEN / "v2", base_model=base)
    assert loaded.config.format_version == 2
    assert loaded.class_names == model.class_names
    assert loaded.config.base_fingerprint["image"]["weights"] == 104
    assert float(loaded.classifier.weight().detach().norm()) == pytest.approx(35.0396, abs=1e-3)


def test_an_old_artifact_is_saved_anew_in_a_format_that_earlier_releases_read(base: str, tmp_path: Path) -> None:
    loaded = Model.from_pretrained(GOLDEN / "v1", base_model=base)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 2
    assert torch.equal(Model.from_pretrained(tmp_path, base_model=base).classifier.residual, loaded.classifier.residual)


def test_golden_artifact_of_the_first_format(model: Model) -> None:
    """A folder written by version 0.1.0 loads for ever."""
    loaded = Model.from_pretrained(GOLDEN / "v1", base_model=str(model.config.base_model_name_or_path))
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


# ---------------------------------------------------------------------- what the third format adds

ADDED = {"strength", "normalize_weight", "logit_scale_factor"}


@pytest.mark.parametrize("what", [None, "strength", "normalize_weight", "logit_scale_factor", "class_bias", "reset"])
def test_the_newest_format_is_for_what_needs_it(model: Model, tmp_path: Path, what: str | None) -> None:
    """Earlier releases refuse format 3 instead of overlooking what is in it, and read everything else."""
    head = random_residual(model).classifier
    values = {"strength": 0.5, "normalize_weight": False, "logit_scale_factor": 2.0, "class_bias": torch.ones(8)}
    if what in values:
        setattr(head, what, values[what])
    if what == "reset":
        head.strength, head.class_bias = 0.5, torch.ones(8)
        head.reset()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format_version"] == (3 if what in values else 2)
    assert set(config) & ADDED == {what} & ADDED
    assert ("class_bias" in load_file(tmp_path / "model.safetensors")) == (what == "class_bias")
    images = torch.randn(4, 192)
    assert torch.equal(Model.from_pretrained(tmp_path)(image_embeds=images).logits, model(image_embeds=images).logits)


def test_half_precision_leaves_the_bias_whole(model: Model, tmp_path: Path) -> None:
    model.classifier.class_bias = torch.linspace(-3000, 3000, 8)
    model.save_pretrained(tmp_path, residual_dtype=torch.float16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["residual"].dtype == torch.float16
    assert torch.equal(stored["class_bias"], torch.linspace(-3000, 3000, 8))


@pytest.mark.parametrize("bias", [torch.full((8,), float("nan")), torch.ones(7), torch.ones(8, 1), torch.ones(1)])
def test_a_bias_that_does_not_fit_is_not_saved(model: Model, tmp_path: Path, bias: torch.Tensor) -> None:
    model.classifier.class_bias = bias
    with pytest.raises(ArtifactError, match=r"class.bias"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def newest(model: Model, tmp_path: Path) -> Path:
    return golden_v3(model, tmp_path / "newest")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("strength", 2), ("strength", -0.5), ("strength", float("nan")), ("strength", "1"), ("strength", True),
        ("strength", None), ("logit_scale_factor", 0), ("logit_scale_factor", -1), ("logit_scale_factor", "1"),
        ("logit_scale_factor", float("nan")), ("logit_scale_factor", float("inf")), ("logit_scale_factor", None),
        ("normalize_weight", "yes"), ("normalize_weight", 1), ("normalize_weight", None),
    ],
)  # fmt: skip
def test_settings_edited_by_hand(newest: Path, key: str, value: Any) -> None:
    config = json.loads((newest / "config.json").read_text())
    (newest / "config.json").write_text(json.dumps({**config, key: value}))
    for read in (_load, describe, AutoModelForImageClassification.from_pretrained):
        with pytest.raises(TaskResError, match=f"{key}.* must be"):
            read(newest)
    with pytest.raises(ArtifactError):
        describe(newest)


@pytest.mark.parametrize("key", ["strength", "normalize_weight", "logit_scale_factor", None])
@pytest.mark.parametrize("version", [1, 2, None])
def test_an_old_format_has_nothing_of_the_newest(model: Model, tmp_path: Path, key: str | None, version: Any) -> None:
    if key is None:
        model.classifier.class_bias = torch.ones(8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    values = {"strength": 0.5, "normalize_weight": False, "logit_scale_factor": 2.0}
    edited = {**config, "format_version": version, **({key: values[key]} if key else {})}
    (tmp_path / "config.json").write_text(json.dumps({name: x for name, x in edited.items() if x is not None}))
    with pytest.raises(ArtifactError, match=f"{key or 'class_bias'}.*format_version"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(7), r"class bias \[7\].*do not belong"),
        (torch.ones(8, 1), "class_bias must be K finite"),
        (torch.full((8,), float("inf")), "class_bias must be K finite"),
        (torch.ones(8, dtype=torch.int64), "class_bias must be K finite"),
    ],
)
def test_a_bias_of_another_kind(newest: Path, bias: torch.Tensor, message: str) -> None:
    tensors = load_file(newest / "model.safetensors")
    save_file({**tensors, "class_bias": bias}, newest / "model.safetensors")
    config = json.loads((newest / "config.json").read_text())
    del config["residual_sha256"]
    (newest / "config.json").write_text(json.dumps(config))
    for read in (_load, describe):
        with pytest.raises(ArtifactError, match=message):
            read(newest)


@pytest.mark.parametrize("change", ["changed", "left out"])
def test_the_checksum_covers_the_bias(newest: Path, change: str) -> None:
    tensors = load_file(newest / "model.safetensors")
    bias = tensors.pop("class_bias")
    save_file(tensors if change == "left out" else {**tensors, "class_bias": bias + 1}, newest / "model.safetensors")
    with pytest.raises(ArtifactError, match="checksum"):
        _load(newest)


def test_a_newer_format_is_told_before_its_tensors(newest: Path) -> None:
    tensors = load_file(newest / "model.safetensors")
    save_file({**tensors, "of_the_future": torch.ones(3)}, newest / "model.safetensors")
    config = json.loads((newest / "config.json").read_text())
    (newest / "config.json").write_text(json.dumps({**config, "format_version": 4}))
    with pytest.raises(ArtifactError, match="upgrade"):
        _load(newest)
