"""What methods fit, served from a saved folder: it must answer as it did before it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import DatasetDict
from sklearn.linear_model import LogisticRegression
from support import run, tiny_config
from transformers import AutoModel, AutoTokenizer, pipeline

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.description import describe
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.errors import ConfigurationError, DataError
from taskres_hf.methods.method import Fitted, Linear
from taskres_hf.methods.saving import write_to_model


@pytest.fixture
def features(model: Model, splits: DatasetDict) -> ImageFeatures:
    return TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True)).embed(splits["train"])


@pytest.fixture
def units(model: Model, splits: DatasetDict) -> np.ndarray:
    """Unit embeddings of held-out pictures."""
    data = TaskResTrainer(model, TaskResTrainingArguments(disable_tqdm=True)).embed(splits["test"])
    return np.asarray(F.normalize(data.image_embeds[0].double(), dim=1))


def _probe(features: ImageFeatures) -> LogisticRegression:
    images = F.normalize(features.image_embeds[0].double(), dim=1).numpy()
    return LogisticRegression(C=10.0, max_iter=2000).fit(images, features.labels.numpy())


def _fitted(probe: LogisticRegression) -> Fitted:
    linear = Linear(torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_))
    return Fitted.of(
        linear, probe.coef_.size + 8, selected={"C": np.float64(10.0)}, selected_on="cross-validation on the shots"
    )


def _gda(features: ImageFeatures) -> Linear:
    """Gaussian classes with one covariance: `W = S^-1 mu_k`, `b_k = -mu_k . S^-1 mu_k / 2`."""
    images, labels = F.normalize(features.image_embeds[0].double(), dim=1), features.labels
    means = torch.stack([images[labels == label].mean(dim=0) for label in range(8)])
    rest = images - means[labels]
    inverse = torch.linalg.inv(rest.T @ rest / len(images) + 0.01 * torch.eye(images.shape[1], dtype=torch.float64))
    return Linear(means @ inverse, -0.5 * (means @ inverse * means).sum(dim=1))


def test_logistic_regression_gives_its_probabilities_wherever_it_is_served(
    model: Model, features: ImageFeatures, units: np.ndarray, splits: DatasetDict, tmp_path: Path
) -> None:
    probe = _probe(features)
    expected = probe.predict_proba(units)
    write_to_model(_fitted(probe), model, method="linear-probe", features=features)
    model.save_pretrained(tmp_path / "probe")
    loaded = Model.from_pretrained(tmp_path / "probe")
    embeds = torch.from_numpy(units).float()
    for one in (model, loaded):
        found = one(image_embeds=embeds).logits.softmax(dim=1).detach().numpy()
        assert np.abs(found - expected).max() < 1e-4
    pictures = [splits["test"][row]["image"].convert("RGB") for row in range(4)]
    inputs = loaded.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    own = F.normalize(loaded.get_image_features(inputs), dim=1).double().numpy()
    served = pipeline("image-classification", model=str(tmp_path / "probe"))(pictures, top_k=8)
    for answers, wanted in zip(served, probe.predict_proba(own), strict=True):
        scores = {row["label"]: row["score"] for row in answers}
        assert [scores[name] for name in loaded.class_names] == pytest.approx(list(wanted), abs=1e-4)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_logits_are_those_that_were_fitted(
    model: Model, features: ImageFeatures, units: np.ndarray, tmp_path: Path, scale: float
) -> None:
    linear = _gda(features)
    linear = Linear(linear.weight * scale, None if linear.bias is None else linear.bias * scale)
    write_to_model(Fitted.of(linear, 1), model)
    model.save_pretrained(tmp_path)
    embeds = torch.from_numpy(units)
    expected = linear.logits(embeds)
    found = Model.from_pretrained(tmp_path)(image_embeds=embeds.float()).logits.double()
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_rows_of_one_length_need_no_newer_format(
    model: Model, features: ImageFeatures, units: np.ndarray, tmp_path: Path
) -> None:
    head = model.classifier
    images = F.normalize(features.image_embeds[0], dim=1)
    means = torch.stack([images[features.labels == label].mean(dim=0) for label in range(8)])
    for linear in (Linear(head.logit_scale * F.normalize(means, dim=1)), Linear(24.0 * F.normalize(means, dim=1))):
        write_to_model(Fitted.of(linear, 0), model)
        model.save_pretrained(tmp_path)
        facts = describe(tmp_path)
        same = linear.weight.norm(dim=1).allclose(torch.tensor(head.logit_scale))
        assert facts["format_version"] == (2 if same else 3)
        assert facts["normalize_weight"]
        embeds = torch.from_numpy(units).float()
        torch.testing.assert_close(model(image_embeds=embeds).logits, linear.logits(embeds), atol=1e-3, rtol=1e-4)


def test_zero_shot_stays_zero_shot(model: Model, units: np.ndarray) -> None:
    head, embeds = model.classifier, torch.from_numpy(units).float()
    write_to_model(Fitted.of(Linear(head.logit_scale * F.normalize(head.base, dim=1)), 0), model)
    assert head.is_zero_shot
    assert torch.equal(model(image_embeds=embeds).logits, model.zero_shot_logits(image_embeds=embeds))


def test_the_bias_of_the_base_is_not_added_twice(base: str) -> None:
    config = tiny_config("siglip")
    config.text_config.vocab_size = 8192
    torch.manual_seed(0)
    siglip = AutoModel.from_config(config)
    with torch.no_grad():
        siglip.logit_bias.fill_(-7.0)
    model = Model.from_base(siglip, ["cat", "dog", "fish"], tokenizer=AutoTokenizer.from_pretrained(base))
    images = torch.randn(6, model.config.projection_dim)
    weight = torch.randn(3, model.config.projection_dim)
    for bias in (None, torch.full((3,), -7.0), torch.tensor([1.0, 2.0, 3.0])):
        linear = Linear(weight, bias)
        write_to_model(Fitted.of(linear, 1), model)
        torch.testing.assert_close(model(image_embeds=images).logits, linear.logits(images), atol=1e-4, rtol=1e-4)
        assert (model.classifier.class_bias is None) == (bias is not None and bool((bias == -7.0).all()))


def test_strength_goes_from_zero_shot_to_what_was_fitted(model: Model, features: ImageFeatures, tmp_path: Path) -> None:
    write_to_model(_fitted(_probe(features)), model)
    model.save_pretrained(tmp_path)
    images = features.image_embeds[0][:16]
    by_strength = {s: Model.from_pretrained(tmp_path, strength=s)(image_embeds=images).logits for s in (0.0, 0.5, 1.0)}
    assert torch.equal(by_strength[0.0], model.zero_shot_logits(image_embeds=images))
    assert torch.equal(by_strength[1.0], model(image_embeds=images).logits)
    assert not torch.allclose(by_strength[0.5], by_strength[1.0], atol=0.1)


def test_it_says_how_it_was_made(
    model: Model, features: ImageFeatures, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_to_model(_fitted(_probe(features)), model, method="linear-probe", features=features)
    model.save_pretrained(tmp_path)
    facts = describe(tmp_path)
    assert (facts["method"], facts["train_images"], facts["class_bias"]) == ("linear-probe", 179, True)
    assert "| method | linear-probe |" in (tmp_path / "README.md").read_text()
    training = Model.from_pretrained(tmp_path).config.training
    assert training["selected"] == {"C": 10.0}
    assert training["selected_on"] == "cross-validation on the shots"
    code, text, _ = run(capsys, "info", tmp_path)
    assert code == 0
    assert "linear-probe" in text


def test_its_shots_are_not_measured_on(model: Model, features: ImageFeatures, tmp_path: Path) -> None:
    write_to_model(_fitted(_probe(features)), model, features=features)
    model.save_pretrained(tmp_path)
    trainer = TaskResTrainer(Model.from_pretrained(tmp_path), TaskResTrainingArguments(disable_tqdm=True))
    with pytest.raises(DataError, match="179 of 179 pictures"):
        trainer.evaluate(features)


@pytest.mark.parametrize(
    ("fitted", "message"),
    [
        (
            Fitted(lambda images: images, 3, not_linear="It keeps a cache of the shots."),
            r"tip-adapter cannot be saved as a residual\. It keeps a cache of the shots\.$",
        ),
        (Fitted(lambda images: images, 3), "not linear"),
        (Fitted.of(Linear(torch.ones(7, 192)), 3), r"\[8, 192\]; got shape \[7, 192\]"),
        (Fitted.of(Linear(torch.ones(8, 192) * float("nan")), 3), "NaN"),
    ],
)
def test_what_cannot_be_saved(model: Model, fitted: Fitted, message: str) -> None:
    before: dict[str, Any] = dict(model.classifier.facts)
    with pytest.raises(ConfigurationError, match=message):
        write_to_model(fitted, model, method="tip-adapter")
    assert model.classifier.facts == before
    assert not model.classifier.residual.any()
