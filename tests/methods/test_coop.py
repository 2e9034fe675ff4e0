"""CoOp against a second computation in which context vectors are words of a larger vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import ENDS_AT_EOS, TINY_FAMILIES, tiny_config
from torch import nn
from transformers import AutoModel, AutoTokenizer, CLIPModel

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import ImageFeatures, embed_images
from taskres_hf.encoders import encode_texts
from taskres_hf.errors import BaseModelError, ConfigurationError
from taskres_hf.methods import coop, towers
from taskres_hf.methods.coop import CoOp, CoOp4, CoOpClassSpecific, CoOpMiddle, context_prompts, published_epochs
from taskres_hf.methods.method import METHODS
from taskres_hf.training.recipes import epoch_batches

NAMES = ["tabby cat", "dog", "sea_horse"]


@pytest.fixture(scope="module")
def features(base: str, splits: Any, spec: dict[str, Any]) -> ImageFeatures:
    """Two shots of each of eight classes, in two views."""
    model = Model.from_base(base, spec["classes"], spec["template"])
    images = LabelledImages(splits["train"])
    rows = [row for label in range(8) for row in [i for i, y in enumerate(images.labels) if y == label][:2]]
    embedder = Embedder(model.clip, model.image_processor)
    return embed_images(embedder, images.select(rows), views=2, progress=False)


class _LargerVocabulary(nn.Module):
    """The words of a text tower, and context vectors as words after the last."""

    def __init__(self, words: torch.Tensor, context: torch.Tensor) -> None:
        super().__init__()
        self.words, self.context = words, context

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, torch.cat([self.words, self.context.reshape(-1, self.words.shape[1])]))


def _prompt(tokenizer: Any, name: str, context: list[int], position: str) -> list[int]:
    words = tokenizer(name, add_special_tokens=False)["input_ids"]
    stop = tokenizer(".", add_special_tokens=False)["input_ids"]
    half = len(context) // 2
    inner = {
        "end": [*context, *words],
        "middle": [*context[:half], *words, *context[half:]],
        "front": [*words, *context],
    }[position]
    return [tokenizer.bos_token_id, *inner, *stop, tokenizer.eos_token_id]


def _reference(
    base: str, model: Model, data: ImageFeatures, tokens: int, position: str, specific: bool, epochs: int, seed: int
) -> torch.Tensor:
    """Rows [K, D] with the logit scale, after that many epochs in plain torch."""
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    classes, vocabulary = len(model.class_names), clip.config.text_config.vocab_size
    shape = (classes, tokens, 192) if specific else (tokens, 192)
    context = (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    words = clip.text_model.embeddings.token_embedding.weight
    clip.text_model.embeddings.token_embedding = _LargerVocabulary(words, context)
    rows = []
    for number, name in enumerate(model.class_names):
        first = vocabulary + (number * tokens if specific else 0)
        rows.append(_prompt(tokenizer, name, list(range(first, first + tokens)), position))
    ids = torch.full((classes, 32), tokenizer.eos_token_id)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)

    def weight() -> torch.Tensor:
        text = clip.get_text_features(input_ids=ids).pooler_output
        return clip.logit_scale.exp() * text / text.norm(dim=-1, keepdim=True)

    images = data.image_embeds / data.image_embeds.norm(dim=-1, keepdim=True)
    optimizer = torch.optim.SGD([context], lr=1.0, momentum=0.9, weight_decay=0.5)
    for epoch in range(epochs):
        rate = 1e-5 if epoch == 0 else 2e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        optimizer.param_groups[0]["lr"] = rate
        for chosen, views in epoch_batches(len(data), 2, 8, seed, epoch):  # the same batches
            optimizer.zero_grad()
            F.cross_entropy(images[views, chosen] @ weight().T, data.labels[chosen]).backward()
            optimizer.step()
    return weight().detach()


@pytest.mark.parametrize("epochs", [0, 4])
@pytest.mark.parametrize(
    ("method", "tokens", "position", "specific"),
    [
        (CoOp, 16, "end", False),
        (CoOp4, 4, "end", False),
        (CoOpMiddle, 16, "middle", False),
        (CoOpClassSpecific, 16, "end", True),
        (lambda **options: CoOp(3, "middle", **options), 3, "middle", False),
        (lambda **options: CoOp(5, "front", True, **options), 5, "front", True),
    ],
)
def test_against_plain_torch(
    base: str, model: Model, features: ImageFeatures, method: Any, tokens: int, position: str, specific: bool,
    epochs: int,
) -> None:  # fmt: skip
    fitted = method(epochs=epochs, batch_size=8, weight_decay=0.5).fit(features, model.classifier, seed=3, model=model)
    expected = _reference(base, model, features, tokens, position, specific, epochs, 3)
    assert fitted.linear is not None
    torch.testing.assert_close(fitted.linear.weight, expected, atol=2e-4, rtol=2e-4)
    assert fitted.trained_parameters == tokens * 192 * (8 if specific else 1)
    logits = F.normalize(features.image_embeds[0], dim=-1) @ expected.T
    torch.testing.assert_close(fitted.logits(features.image_embeds[0]), logits, atol=1e-3, rtol=1e-3)


def test_contexts_of_classes_in_parts(model: Model, features: ImageFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    method = CoOpClassSpecific(4, epochs=3)
    whole = method.fit(features, model.classifier, model=model).linear
    monkeypatch.setattr(coop, "in_parts", lambda embed, count: towers.in_parts(embed, count, 3))
    parts = method.fit(features, model.classifier, model=model).linear
    assert whole is not None
    assert parts is not None
    torch.testing.assert_close(parts.weight, whole.weight, atol=1e-4, rtol=1e-4)


def test_training_lowers_the_loss_and_leaves_the_model(model: Model, features: ImageFeatures) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for epochs in (0, 30):
        fitted = CoOp4(epochs=epochs).fit(features, model.classifier, model=model)
        losses.append(float(F.cross_entropy(fitted.logits(features.image_embeds[0]), features.labels)))
    assert losses[1] < losses[0] - 0.1
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    again = CoOp4(epochs=30).fit(features, model.classifier, model=model)
    assert again.linear is not None
    assert fitted.linear is not None
    assert torch.equal(again.linear.weight, fitted.linear.weight)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_words_to_start_from_give_the_prompts_embedding(family: str, base: str) -> None:
    """Whatever the text tower is made of: vectors of words in their places are the prompt of these words."""
    config = tiny_config(family)
    config.text_config.vocab_size = 8192
    if family in ENDS_AT_EOS:  # these read their answer where the text ends
        config.text_config.eos_token_id = 8191
    torch.manual_seed(0)
    tower = AutoModel.from_config(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    other = Model.from_base(tower, NAMES, tokenizer=tokenizer)
    dim = other.config.projection_dim
    data = ImageFeatures(torch.randn(1, 6, dim), torch.arange(6) % 3, NAMES, "")
    fitted = CoOp(init="a photo of a", epochs=0).fit(data, other.classifier, model=other)
    expected = encode_texts(tower, tokenizer, [f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    assert fitted.linear is not None
    found = fitted.linear.weight / other.classifier.logit_scale
    torch.testing.assert_close(found, F.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)
    scores = other.classifier.zero_shot_logits(data.image_embeds[0])
    torch.testing.assert_close(fitted.logits(data.image_embeds[0]), scores, atol=1e-3, rtol=1e-4)
    trained = CoOp(4, epochs=2, learning_rate=1.0).fit(data, other.classifier, model=other)
    start = CoOp(4, epochs=0).fit(data, other.classifier, model=other)
    assert trained.linear is not None
    assert start.linear is not None
    assert not torch.allclose(trained.linear.weight, start.linear.weight, rtol=1e-6, atol=0)


def test_a_text_tower_that_was_not_loaded_is_loaded(model: Model, features: ImageFeatures, tmp_path: Any) -> None:
    model.save_pretrained(tmp_path)
    light = Model.from_pretrained(tmp_path)
    expected = CoOp4(epochs=2).fit(features, model.classifier, model=model)
    found = CoOp4(epochs=2).fit(features, light.classifier, model=light)
    assert expected.linear is not None
    assert found.linear is not None
    torch.testing.assert_close(found.linear.weight, expected.linear.weight)


def test_a_class_without_a_picture_keeps_its_row(model: Model, features: ImageFeatures) -> None:
    seen = features.select([row for row, label in enumerate(features.labels.tolist()) if label not in (2, 5)])
    fitted = CoOpClassSpecific(4, epochs=2).fit(seen, model.classifier, model=model)
    assert fitted.linear is not None
    expected = model.classifier.logit_scale * F.normalize(model.classifier.base, dim=-1)
    assert torch.equal(fitted.linear.weight[[2, 5]], expected[[2, 5]])
    assert not torch.isclose(fitted.linear.weight[[0, 1, 3, 4, 6, 7]], expected[[0, 1, 3, 4, 6, 7]]).all(dim=1).any()
    assert fitted.trained_parameters == 6 * 4 * 192
    one_for_all = CoOp4(epochs=2).fit(seen, model.classifier, model=model)
    assert one_for_all.linear is not None
    assert one_for_all.trained_parameters == 4 * 192
    assert bool(torch.isfinite(one_for_all.linear.weight).all())


class _Tokenizer:
    """As SigLIP's: nothing before a text, one token after it, and no token for a full stop."""

    model_max_length, pad_token_id, padding_side = 16, 1, "right"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [10 + ord(letter) for letter in text.replace(".", "")]
        return {"input_ids": [*ids, 1] if add_special_tokens else ids}


def test_prompts_of_a_tokenizer_without_an_opening_token() -> None:
    config = tiny_config("siglip")
    prompts = context_prompts(config, _Tokenizer(), ["ab", "c"], 3, "middle")
    a, b, c = (10 + ord(letter) for letter in "abc")
    assert list(prompts.tokens) == ["input_ids"]
    ids = prompts.tokens["input_ids"]
    assert ids.shape == (2, 16)
    assert prompts.places.tolist() == [[0, 3, 4], [0, 2, 3]]
    assert ids[0, [1, 2, 5]].tolist() == [a, b, 1]
    assert ids[1, [1, 4, 15]].tolist() == [c, 1, 1]
    tokenizer = _Tokenizer()
    tokenizer.padding_side = "left"
    padded = context_prompts(tiny_config("clip"), tokenizer, ["ab", "c"], 3, "end")
    assert padded.places.tolist() == [[0, 1, 2], [1, 2, 3]]
    assert padded.tokens["attention_mask"].tolist() == [[1] * 6, [0, *[1] * 5]]
    assert padded.tokens["input_ids"][1, [0, 4, 5]].tolist() == [1, c, 1]


def test_what_is_refused(model: Model, features: ImageFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="position"):
        CoOp(position="start")
    with pytest.raises(ConfigurationError, match="tokens"):
        CoOp(tokens=0)
    with pytest.raises(ConfigurationError, match="text tower: pass model="):
        CoOp().fit(features, model.classifier)
    with pytest.raises(ConfigurationError, match=r"the prompt of '.+' has \d+ tokens; the text tower reads 32"):
        CoOp(30).fit(features, model.classifier, model=model)
    other = Model.from_base(model.clip, ["cat", "dog"], tokenizer=model.tokenizer)
    with pytest.raises(ConfigurationError, match="2 classes, the classifier 8"):
        CoOp().fit(features, model.classifier, model=other)
    with pytest.raises(ConfigurationError, match="no tokens"):
        context_prompts(model.clip, model.tokenizer, [""], 4, "end")
    words = model.clip.text_model.embeddings.token_embedding
    model.clip.text_model.embeddings.token_embedding = _LargerVocabulary(words.weight, words.weight[:0])
    with pytest.raises(BaseModelError, match=r"'clip' base .* has 0 embedding layers"):
        CoOp().fit(features, model.classifier, model=model)


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_published_epochs(shots: int, epochs: int) -> None:
    assert published_epochs(torch.arange(5).repeat(shots)) == epochs


def test_the_names_are_registered() -> None:
    made = {name: METHODS[name]() for name in ("coop", "coop-4", "coop-middle", "coop-class-specific")}
    assert {name: method.name for name, method in made.items()} == {name: name for name in made}
    facts = {name: (m.tokens, m.position, m.class_specific) for name, m in made.items() if isinstance(m, CoOp)}
    assert facts == {
        "coop": (16, "end", False),
        "coop-4": (4, "end", False),
        "coop-middle": (16, "middle", False),
        "coop-class-specific": (16, "end", True),
    }
    method = CoOp()
    assert (method.learning_rate, method.weight_decay, method.batch_size) == (2e-3, 5e-4, 32)
