"""CLIP-LoRA against low-rank updates written here a second time, without `peft`."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import ENDS_AT_EOS, TINY_FAMILIES, pil_processor, tiny_config
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPModel,
)

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import ImageFeatures, embed_images
from taskres_hf.errors import BaseModelError, ConfigurationError, MissingExtraError
from taskres_hf.methods import clip_lora, towers
from taskres_hf.methods.clip_lora import CLIPLoRA
from taskres_hf.methods.method import METHODS

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the `lora` extra is not installed")
_ONE = {tower: [f"{tower}_model.encoder.layers.0.self_attn.q_proj"] for tower in ("text", "vision")}
PARTS = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(scope="module")
def images(splits: Any) -> LabelledImages:
    """One shot of each of eight classes."""
    every = LabelledImages(splits["train"])
    return every.select([every.labels.index(label) for label in range(8)])


@pytest.fixture(scope="module")
def features(base: str, images: LabelledImages, spec: dict[str, Any]) -> ImageFeatures:
    model = Model.from_base(base, spec["classes"], spec["template"])
    return embed_images(Embedder(model.clip, model.image_processor), images, progress=False)


@needs_peft
def test_no_step_is_zero_shot(model: Model, features: ImageFeatures, images: LabelledImages) -> None:
    fitted = CLIPLoRA(steps=0).fit(features, model.classifier, model=model, images=images)
    assert fitted.embed is not None
    assert fitted.linear is None
    assert "image tower" in fitted.not_linear
    expected = model.classifier.zero_shot_logits(features.image_embeds[0])
    torch.testing.assert_close(fitted.logits(fitted.embed(images)), expected, atol=1e-4, rtol=1e-5)
    pictures = [images.image(row) for row in range(len(images))]
    torch.testing.assert_close(fitted.embed(pictures), features.image_embeds[0], atol=1e-5, rtol=1e-5)


@needs_peft
@pytest.mark.parametrize("rank", [2, 3])
def test_number_of_trained_parameters(model: Model, features: ImageFeatures, images: LabelledImages, rank: int) -> None:
    fitted = CLIPLoRA(rank, steps=0).fit(features, model.classifier, model=model, images=images)
    text, vision = model.clip.config.text_config, model.clip.config.vision_config
    expected = sum(
        tower.num_hidden_layers * 3 * rank * (tower.hidden_size + tower.hidden_size) for tower in (text, vision)
    )
    assert fitted.trained_parameters == expected


class _Updated(nn.Module):
    """x W^T + b + x A^T B^T / sqrt(2)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b = nn.Parameter(_start(2, layer.in_features)), nn.Parameter(torch.zeros(layer.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = x @ self.a.T @ self.b.T / math.sqrt(2)
        return self.layer(x) + update


def _start(rows: int, columns: int) -> torch.Tensor:
    return torch.cos(torch.arange(rows * columns, dtype=torch.float32)).view(rows, columns) / columns**0.5


def _reference(
    base: str, names: list[str], template: str, pixels: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image embeddings of unit length and the logits after that many full-batch steps."""
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for tower in (clip.text_model, clip.vision_model):
        for layer in tower.encoder.layers:
            for part in PARTS:
                setattr(layer.self_attn, part, _Updated(getattr(layer.self_attn, part)))
    trained = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=100.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    tokens = tokenizer([template.format(name) for name in names], padding=True, return_tensors="pt")

    def embedded() -> tuple[torch.Tensor, torch.Tensor]:
        image = clip.get_image_features(pixels).pooler_output
        text = clip.get_text_features(**tokens).pooler_output
        image, text = image / image.norm(dim=-1, keepdim=True), text / text.norm(dim=-1, keepdim=True)
        return image, clip.logit_scale.exp() * image @ text.T

    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(embedded()[1], torch.arange(len(names))).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return embedded()


@needs_peft
def test_steps_against_plain_torch(
    base: str, model: Model, features: ImageFeatures, images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what is drawn: dropout, augmentation, the start of the first matrix."""
    monkeypatch.setattr(clip_lora, "augment", lambda picture, size, generator: picture.resize(size[::-1]))
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **_: tensor.data.copy_(_start(*tensor.shape)))
    fitted = CLIPLoRA(dropout=0.0, weight_decay=100.0, steps=6).fit(
        features, model.classifier, model=model, images=images
    )
    monkeypatch.undo()
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    pixels = processor([images.image(row) for row in range(8)], return_tensors="pt")["pixel_values"]
    assert len(model.class_prompts()[0]) == 1
    template = model.config.templates[0]
    embeds, logits = _reference(base, model.class_names, template, pixels, 6)
    assert fitted.embed is not None
    found = fitted.embed(images)
    torch.testing.assert_close(F.normalize(found, dim=-1), embeds, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(fitted.logits(found), logits, atol=1e-2, rtol=1e-3)
    moved = (logits - model.classifier.zero_shot_logits(features.image_embeds[0])).abs().max()
    assert moved > 20 * (fitted.logits(found) - logits).abs().max()


@needs_peft
def test_only_the_updates_are_trained(model: Model, features: ImageFeatures, images: LabelledImages) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [(name, type(module), module.training) for name, module in model.named_modules()]
    generator = torch.get_rng_state()
    fitted = CLIPLoRA(steps=3, learning_rate=1e-2).fit(features, model.classifier, model=model, images=images)
    assert isinstance(fitted.embed, clip_lora._TunedTower)
    tuned = fitted.embed._tuned.state_dict()
    assert tuned.keys() == model.clip.state_dict().keys()
    changed = {name for name, value in model.clip.state_dict().items() if not torch.equal(tuned[name], value)}
    assert changed == {name for name in tuned if name.endswith("weight") and name.split(".")[-2] in PARTS}
    for name in changed:
        update = (tuned[name] - model.clip.state_dict()[name]).double()
        assert torch.linalg.svdvals(update)[2] < 1e-4 * torch.linalg.svdvals(update)[0]  # rank 2
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [(name, type(module), module.training) for name, module in model.named_modules()] == kinds
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.clip.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    again = CLIPLoRA(steps=3, learning_rate=1e-2).fit(features, model.classifier, model=model, images=images)
    assert again.embed is not None
    assert torch.equal(again.logits(again.embed(images)), fitted.logits(fitted.embed(images)))
    other = CLIPLoRA(steps=3, learning_rate=1e-2).fit(features, model.classifier, seed=2, model=model, images=images)
    assert other.embed is not None
    assert not torch.equal(other.embed(images), fitted.embed(images))


@needs_peft
def test_published_number_of_steps(
    model: Model, features: ImageFeatures, images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 a shot, the last batch of an epoch included though smaller, with dropout."""
    seen: list[int] = []
    active: list[bool] = []

    def rows(base: Any, tokens: Any) -> torch.Tensor:
        active.extend(module.training for module in base.modules() if isinstance(module, nn.Dropout))
        trained = [parameter.sum() for parameter in base.parameters() if parameter.requires_grad]
        return sum(trained, torch.zeros(())) * torch.ones(8, 192)

    def inputs(self: Any, chosen: Any, epoch: int) -> dict[str, torch.Tensor]:
        seen.append(len(chosen))
        return {"pixel_values": torch.zeros(len(chosen), 3, 64, 64)}

    monkeypatch.setattr(clip_lora, "_rows", rows)
    monkeypatch.setattr(clip_lora, "image_features", lambda base, inputs: torch.zeros(len(inputs["pixel_values"]), 192))
    monkeypatch.setattr(clip_lora._Shots, "inputs", inputs)
    monkeypatch.setattr(CLIPLoRA, "_targets", lambda *_: (_ONE["text"], _ONE["vision"]))
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: logits.mean())
    order = [*range(8), 0]
    CLIPLoRA(batch_size=5).fit(features.select(order), model.classifier, model=model, images=images.select(order))
    assert seen == [5, 4] * 500
    method = CLIPLoRA()
    assert (method.batch_size, method.weight_decay, method.dropout, method.alpha) == (32, 1e-2, 0.25, 1.0)
    assert active
    assert all(active)


def _processor(family: str) -> Any:
    if family == "siglip2":
        return pil_processor("Siglip2", patch_size=8, max_num_patches=16)
    size = {"height": 32, "width": 32}
    return pil_processor("CLIP", size=size, crop_size=size)


@needs_peft
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_family(family: str, base: str, images: LabelledImages, spec: dict[str, Any]) -> None:
    """A tower without separate queries, keys and values stays as it is, and the result is linear then."""
    config = tiny_config(family)
    config.text_config.vocab_size = 8192
    if family in ENDS_AT_EOS:
        config.text_config.eos_token_id = 8191
    torch.manual_seed(0)
    tower = AutoModel.from_config(config).eval()
    other = Model.from_base(
        tower, spec["classes"], tokenizer=AutoTokenizer.from_pretrained(base), image_processor=_processor(family)
    )
    data = embed_images(Embedder(tower, other.image_processor), images, progress=False)
    text_alone = family in ("align", "blip")
    for steps in (0, 2):
        method = CLIPLoRA(steps=steps, learning_rate=1e-2)
        if text_alone:
            with pytest.warns(UserWarning, match="The image tower has no separate linear layers"):
                fitted = method.fit(data, other.classifier, model=other, images=images)
        else:
            fitted = method.fit(data, other.classifier, model=other, images=images)
        plain = (1 if text_alone else 2) * 2 * 3  # two layers a tower, three projections each
        more = {"aimv2": 2, "groupvit": 15}.get(family, 0)  # AIMv2's pooling; GroupViT's third layer and its groups
        assert fitted.trained_parameters == (plain + more) * 2 * (32 + 32)
        assert (fitted.embed is None, fitted.linear is not None) == (text_alone, text_alone)
        embeds = data.image_embeds[0] if fitted.embed is None else fitted.embed(images)
        expected = other.classifier.zero_shot_logits(data.image_embeds[0])
        assert torch.allclose(fitted.logits(embeds), expected, atol=1e-4, rtol=1e-4) == (steps == 0)


@needs_peft
def test_a_rounded_base(model: Model, features: ImageFeatures, images: LabelledImages, spec: dict[str, Any]) -> None:
    half = Model.from_base(model.clip.config._name_or_path, spec["classes"], spec["template"], dtype=torch.bfloat16)
    fitted = CLIPLoRA(steps=1).fit(features, half.classifier, model=half, images=images)
    assert fitted.embed is not None
    expected = half.classifier.zero_shot_logits(features.image_embeds[0])
    torch.testing.assert_close(fitted.logits(fitted.embed(images)), expected, atol=0.05, rtol=0.01)
    assert {parameter.dtype for parameter in half.clip.parameters()} == {torch.bfloat16}


@needs_peft
def test_a_base_with_neither(
    model: Model, features: ImageFeatures, images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(towers, "_QUERY_KEY_VALUE", frozenset())
    with pytest.raises(BaseModelError, match="Neither tower"):
        CLIPLoRA().fit(features, model.classifier, model=model, images=images)


def test_what_is_refused(
    model: Model, features: ImageFeatures, images: LabelledImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS["clip-lora"]()
    with pytest.raises(ConfigurationError, match="needs the pictures and the text tower: pass model="):
        method.fit(features, model.classifier)
    with pytest.raises(ConfigurationError, match="pass images="):
        method.fit(features, model.classifier, model=model)
    with pytest.raises(ConfigurationError, match="The 8 pictures of images= are not those of the 8 embeddings"):
        method.fit(features, model.classifier, model=model, images=images.select(range(7, -1, -1)))
    with pytest.raises(ConfigurationError, match="rank"):
        CLIPLoRA(rank=0)
    with pytest.raises(ConfigurationError, match="steps"):
        CLIPLoRA(steps=-1)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a))
    with pytest.raises(MissingExtraError, match=r"taskres_hf\[lora\]"):
        method.fit(features, model.classifier, model=model, images=images)
