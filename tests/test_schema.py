"""What an artifact's files must hold: everything else is an error of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import copied, forge, golden_v3
from transformers import AutoModelForImageClassification

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError, TaskResError

Model = TaskResCLIPForImageClassification


def _load(folder: Path) -> None:
    Model.from_pretrained(folder)


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
    folder = forge(copied(trained, tmp_path / "a"), tensors)
    with pytest.raises(ArtifactError, match=message):
        _load(folder)


@pytest.mark.parametrize("key", ["base_fingerprint", "projection_dim", "id2label", "base_model_name_or_path"])
def test_missing_config_keys(trained: Path, tmp_path: Path, key: str) -> None:
    folder = forge(copied(trained, tmp_path / "a"), drop=key)
    with pytest.raises(ArtifactError, match=key):
        _load(folder)


def test_newer_format_and_broken_json(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format_version": 6}))
    with pytest.raises(ArtifactError, match="upgrade"):
        _load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="JSON"):
        _load(folder)


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
    folder = forge(copied(trained, tmp_path / "a"), **{key: value})
    with pytest.raises(TaskResError):
        _load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dtype", "x"), ("dtype", []), ("format_version", True), ("format_version", 0), ("templates", 3),
        ("base_fingerprint.shape", -1), ("base_fingerprint.shape", {"a": 1}), ("base_fingerprint.dtype", []),
        ("id2label", ["a"]), ("id2label", {"a": 1}),
    ],
)  # fmt: skip
def test_values_of_another_type_are_errors_of_ours(trained: Path, tmp_path: Path, key: str, value: Any) -> None:
    config = json.loads((copied(trained, tmp_path / "a") / "config.json").read_text())
    *outer, last = key.split(".")
    (config[outer[0]] if outer else config)[last] = value
    forge(tmp_path / "a", **config)
    for loader in (Model, AutoModelForImageClassification):
        with pytest.raises(TaskResError):
            loader.from_pretrained(tmp_path / "a")


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
    forge(newest, **{key: value})
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
    values = {"strength": 0.5, "normalize_weight": False, "logit_scale_factor": 2.0}
    added = {"format_version": version, **({key: values[key]} if key else {})}
    forge(tmp_path, drop="" if version else "format_version", **added)
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
    forge(newest, {**tensors, "class_bias": bias})
    for read in (_load, describe):
        with pytest.raises(ArtifactError, match=message):
            read(newest)


def test_a_newer_format_is_told_before_its_tensors(newest: Path) -> None:
    tensors = load_file(newest / "model.safetensors")
    save_file({**tensors, "of_the_future": torch.ones(3)}, newest / "model.safetensors")
    config = json.loads((newest / "config.json").read_text())
    (newest / "config.json").write_text(json.dumps({**config, "format_version": 6}))
    with pytest.raises(ArtifactError, match="upgrade"):
        _load(newest)
