"""Formats of the saved folder: each that was released loads for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import golden_v3, random_residual

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.description import describe
from taskres_hf.errors import ArtifactError

Model = TaskResCLIPForImageClassification
GOLDEN = Path(__file__).parent / "golden"
ADDED = {"strength", "normalize_weight", "logit_scale_factor", "base_classifier"}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_old_formats_give_the_answers_they_gave_bit_for_bit(base: str, version: str) -> None:
    head = Model.from_pretrained(GOLDEN / version, base_model=base).classifier
    tensors = load_file(GOLDEN / version / "model.safetensors")
    frozen = head.base + tensors["base_shift"].float() if version == "v2" else head.base
    weight = frozen + 0.5 * tensors["residual"].float()
    images = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    cosine = head.logit_scale * F.normalize(images, dim=-1) @ F.normalize(weight, dim=-1).T
    assert torch.equal(head(images), cosine + head.logit_bias)


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
