"""Every family of models of texts, from a checkpoint on disk to `pipeline`; and what is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from text_models import CLASSES, FAMILIES, tiny_text_model, tiny_tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from taskres_hf import TaskResForSequenceClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.errors import BaseModelError, ConfigurationError
from taskres_hf.language.tower import tokenizer_digest

LABELS = ("Sports", "red", "politics", "cooking", "blue")
TEXTS = ["the goal of the match", "bake the bread and salt the soup", "a vote"]


def tokens(padding: Any = True) -> dict[str, torch.Tensor]:
    return dict(tiny_tokenizer()(TEXTS, padding=padding, return_tensors="pt"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_classifier_to_pipeline(family: str, text_base: Callable[..., str], texts: Any, tmp_path: Path) -> None:
    folder = text_base(family, LABELS)
    own = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = own(**tokens()).logits
        assert expected.std() > 0
        assert torch.equal(Model.from_base(folder, list(LABELS))(**tokens()).logits, expected)
        model = Model.from_base(folder, CLASSES)
        assert model.config.base_classifier == "head"
        places = [[label.lower() for label in LABELS].index(name) for name in CLASSES]
        torch.testing.assert_close(model(**tokens()).logits, expected[:, places])
    TaskResTrainer(model, TaskResTrainingArguments(shots=4, disable_tqdm=True), texts).train()
    check_saved(model, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_from_an_encoder_to_pipeline(family: str, text_base: Callable[..., str], texts: Any, tmp_path: Path) -> None:
    model = Model.from_base(text_base(family), CLASSES)
    assert model.config.base_classifier == "class_names"
    bare, given = AutoModel.from_pretrained(text_base(family)).eval(), tokens()
    with torch.no_grad():
        hidden, mask = bare(**given).last_hidden_state, given["attention_mask"][..., None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(model.get_text_features(**given), mean)
        names = model.tokenizer(
            [f"This sentence is about {name}." for name in CLASSES], padding=True, return_tensors="pt"
        )
        rows = torch.nn.functional.normalize(model.get_text_features(**names), dim=1)
        cosines = torch.nn.functional.normalize(mean, dim=1) @ rows.T
        torch.testing.assert_close(model(**given).logits, 20 * cosines, atol=1e-4, rtol=1e-4)
    TaskResTrainer(model, TaskResTrainingArguments(shots=4, disable_tqdm=True), texts).train()
    check_saved(model, tmp_path)


def check_saved(model: Any, tmp_path: Path) -> None:
    """It learned, loads again to the last bit and answers through `pipeline`."""
    assert not model.classifier.is_zero_shot
    model.save_pretrained(tmp_path / "trained")
    again = Model.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        logits = model(**tokens()).logits
        assert torch.equal(again(**tokens()).logits, logits)
        alone = [model(**tiny_tokenizer()(text, return_tensors="pt")).logits for text in TEXTS]
    torch.testing.assert_close(torch.cat(alone), logits, atol=1e-3, rtol=1e-3)  # padding says nothing
    answers = pipeline("text-classification", model=str(tmp_path / "trained"))(TEXTS)
    assert [one["label"] for one in answers] == [model.class_names[int(row.argmax())] for row in logits]


def test_a_loaded_model_is_left_as_it_is() -> None:
    own = tiny_text_model("bert", LABELS)
    with torch.no_grad():
        before = own(**tokens()).logits
        model = Model.from_base(own, list(LABELS), tokenizer=tiny_tokenizer())
        assert torch.equal(model(**tokens()).logits, before)
        assert torch.equal(own(**tokens()).logits, before)
    assert model.backbone.model.bert is own.bert  # shared, not copied
    assert own.bert.pooler is not None


def test_what_is_no_model_of_texts(base: str, trained: Path, text_base: Callable[..., str]) -> None:
    for given, why in ((base, "reads pictures too"), (trained, "from_pretrained")):
        with pytest.raises(BaseModelError, match=why):
            Model.from_base(given, CLASSES)
    from taskres_hf import TaskResCLIPForImageClassification

    with pytest.raises(BaseModelError, match="TaskResForSequenceClassification"):
        TaskResCLIPForImageClassification.from_base(text_base(), CLASSES)


def test_lost_weights_are_not_filled_with_random_numbers(text_base: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(text_base(), tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(file)

    def keep(part: str) -> None:
        file.unlink()  # not written over: older safetensors maps it into memory
        save_file({name: one for name, one in tensors.items() if part not in name}, file, {"format": "pt"})

    keep("pooler")
    Model.from_base(tmp_path / "bert", CLASSES)  # which nothing here asks
    keep("query.bias")
    with pytest.raises(BaseModelError, match="lacks 2 weights"):
        Model.from_base(tmp_path / "bert", CLASSES)


def test_code_of_its_own_does_not_run(text_base: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(text_base(), tmp_path / "bert")
    path = tmp_path / "bert" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(BaseModelError, match="trust_remote_code"):
        Model.from_base(tmp_path / "bert", CLASSES)


def test_names_that_are_the_same_tokens(text_base: Callable[..., str]) -> None:
    with pytest.raises(ConfigurationError, match="same tokens"):
        Model.from_base(text_base(), ["zebra", "giraffe"])  # both unknown


def test_a_call_does_not_change_what_tells_a_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=5)
    assert tokenizer_digest(tokenizer) == before
