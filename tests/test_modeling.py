"""The model: equal to CLIP at zero residual, frozen base, round trips through every loader."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual, tiny_config, tiny_images
from transformers import (
    AutoTokenizer,
    CLIPModel,
)

from taskres_hf import (
    TaskResCLIPForImageClassification,
)
from taskres_hf.errors import ConfigurationError

Model = TaskResCLIPForImageClassification


def test_zero_residual_equals_clip(model: Model, base: str, pixel_values: torch.Tensor) -> None:
    tokens = AutoTokenizer.from_pretrained(base)(
        [prompts[0] for prompts in model.class_prompts()], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(base, dtype=torch.float32)(pixel_values=pixel_values, **tokens)
    logits = model(pixel_values=pixel_values).logits
    assert (logits - expected.logits_per_image).abs().max() <= 1e-4
    assert torch.equal(logits, model.zero_shot_logits(pixel_values))


def test_embeddings_and_pixels_give_the_same(model: Model, pixel_values: torch.Tensor) -> None:
    random_residual(model)
    embeds = model.get_image_features(pixel_values)
    assert embeds.shape == (8, model.config.projection_dim)
    torch.testing.assert_close(model(image_embeds=embeds).logits, model(pixel_values=pixel_values).logits)
    torch.testing.assert_close(model(image_embeds=3 * embeds).logits, model(image_embeds=embeds).logits)


def test_ensemble_is_the_raw_mean(base: str, spec: dict[str, Any]) -> None:
    templates = ["a photo of a {}.", "art of the {}."]
    rows = [Model.from_base(base, spec["classes"], template).classifier.base for template in templates]
    ensemble = Model.from_base(base, spec["classes"], templates)
    torch.testing.assert_close(ensemble.classifier.base, (rows[0] + rows[1]) / 2, atol=1e-4, rtol=1e-4)
    normalized = Model.from_base(base, spec["classes"], templates, prompt_average="normalized")
    assert not torch.allclose(normalized.classifier.base, ensemble.classifier.base, atol=1e-3)


def test_only_the_residual_trains_and_the_base_stays(model: Model, pixel_values: torch.Tensor) -> None:
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["classifier.residual"]
    before = copy.deepcopy(model.clip.state_dict())
    model.train()
    assert model.training
    assert not any(module.training for module in model.clip.modules())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(pixel_values=pixel_values, labels=torch.arange(8)).loss
    loss.backward()
    optimizer.step()
    assert model(pixel_values=pixel_values, labels=torch.arange(8)).loss < loss
    assert all(torch.equal(before[name], value) for name, value in model.clip.state_dict().items())


def test_output_is_what_transformers_gives(model: Model, pixel_values: torch.Tensor) -> None:
    output = model(pixel_values=pixel_values, labels=torch.zeros(8, dtype=torch.long), output_hidden_states=True)
    assert set(output.keys()) == {"loss", "logits", "hidden_states"}
    assert isinstance(model(pixel_values=pixel_values, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "either pixel_values or image_embeds"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64), "image_embeds": torch.zeros(1, 192)}, "both or neither"),
        ({"image_embeds": torch.zeros(1, 7)}, "192 columns"),
        ({"image_embeds": torch.ones(1, 192), "labels": torch.tensor([8])}, "from 0 to 7; got 8"),
        ({"image_embeds": torch.ones(1, 192), "labels": torch.tensor([-1])}, "got -1"),
    ],
)
def test_bad_inputs(model: Model, inputs: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        model(**inputs)


# ---------------------------------------------------------------------- one home for each fact


def test_head_and_config_say_the_same(model: Model, tmp_path: Path) -> None:
    random_residual(model)
    model.classifier.shift = torch.ones_like(model.classifier.base)
    model.config.enhanced_base, model.config.metrics = {"epochs": 50}, {"accuracy": 1.0}
    model.classifier.alpha = 0.75
    assert model.config.alpha == 0.75
    model.config.alpha = 1.25
    assert model.classifier.alpha == 1.25
    model.save_pretrained(tmp_path / "enhanced")
    loaded = Model.from_pretrained(tmp_path / "enhanced")
    assert loaded.config.enhanced_base == {"epochs": 50}
    loaded.classifier.reset()
    assert loaded.config.enhanced_base is loaded.config.metrics is None
    loaded.save_pretrained(tmp_path / "reset")
    config = json.loads((tmp_path / "reset" / "config.json").read_text())
    assert not config.get("enhanced_base")
    assert not config.get("metrics")
    assert config["alpha"] == 1.25
    assert "facts" not in config


def test_a_shift_taken_away_is_not_told_of(model: Model, tmp_path: Path) -> None:
    model.config.enhanced_base = {"epochs": 50}
    model.save_pretrained(tmp_path)  # without a shift
    assert not json.loads((tmp_path / "config.json").read_text()).get("enhanced_base")


# ---------------------------------------------------------------------- other families, other labels


def test_zero_shot_logits_take_what_forward_takes(base: str) -> None:
    from transformers import AutoModel

    config = tiny_config("siglip2")
    config.text_config.vocab_size = 8192
    torch.manual_seed(0)
    siglip2 = AutoModel.from_config(config)
    other = Model.from_base(siglip2, ["cat", "dog"], tokenizer=AutoTokenizer.from_pretrained(base))
    inputs = tiny_images("siglip2")
    assert torch.equal(other.zero_shot_logits(**inputs), other(**inputs).logits)
    embeds = other.get_image_features(**inputs)
    assert torch.equal(other.zero_shot_logits(image_embeds=embeds), other(**inputs).logits)
    with pytest.raises(ConfigurationError, match="either pixel_values or image_embeds"):
        other.zero_shot_logits()


def test_probabilities_as_labels(model: Model) -> None:
    embeds = torch.randn(8, 192)
    ids = torch.arange(8)
    soft = torch.nn.functional.one_hot(ids, 8).float()
    hard = model(image_embeds=embeds, labels=ids).loss
    torch.testing.assert_close(model(image_embeds=embeds, labels=soft).loss, hard)
    with pytest.raises(ConfigurationError, match="multi_label_classification"):
        model(image_embeds=embeds, labels=soft + soft.flip(0))


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_pictures_that_are_not_numbers_get_no_answer(model: Model, pixel_values: torch.Tensor, pixel: float) -> None:
    spoilt = pixel_values.clone()
    spoilt[3] = pixel
    with pytest.raises(ConfigurationError, match="1 of 8 pictures"):
        model(pixel_values=spoilt)


def test_prompts_cut_to_the_same_tokens_are_named(base: str) -> None:
    long = "long " * 40
    with pytest.warns(UserWarning, match=r"1 pair of classes' prompts.*cat.*dog"):
        Model.from_base(base, [f"{long}cat", f"{long}dog", "bird"])


def test_a_classifier_remembers_the_commit_of_a_base_already_loaded(hub: Any, base: str, tmp_path: Path) -> None:
    commit = hub.add_folder("tester/tiny-clip", base)
    clip = CLIPModel.from_pretrained("tester/tiny-clip", dtype=torch.float32)
    other = random_residual(Model.from_base(clip, ["cat", "dog"]))
    assert other.config.base_model_revision == commit
    other.save_pretrained(tmp_path / "a")
    words = json.loads((Path(base) / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
    hub.repos["models/tester/tiny-clip"].commit({"tokenizer.json": json.dumps(words).encode()}, "main", "swap")
    loaded = Model.from_pretrained(tmp_path / "a", base_model=clip)  # the tokenizer of the pinned commit, not of main
    assert torch.equal(loaded.classifier.weight(), other.classifier.weight())
    assert loaded.tokenizer("cat")["input_ids"] == other.tokenizer("cat")["input_ids"]
