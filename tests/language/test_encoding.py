"""What a folder of sentence-transformers says of pooling, length and prompt; and what is said otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from text_models import CLASSES, as_sentence_transformer, tiny_tokenizer
from transformers import AutoModel, AutoTokenizer

from taskres_hf import TaskResForSequenceClassification as Model
from taskres_hf.errors import BaseModelError, ConfigurationError
from taskres_hf.language.encoding import pool

HIDDEN = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [9.0, 9.0]]])
MASK = torch.tensor([[1, 1, 0]])


@pytest.mark.parametrize(("how", "expected"), [("mean", [2.0, -3.0]), ("cls", [1.0, -4.0]), ("max", [3.0, -2.0])])
def test_padding_takes_no_part(how: str, expected: list[float]) -> None:
    assert pool(HIDDEN, MASK, how)[0].tolist() == expected


@pytest.fixture
def folder(text_base: Callable[..., str], tmp_path: Path) -> Path:
    shutil.copytree(text_base(), tmp_path / "st")
    return tmp_path / "st"


def test_the_checkpoint_says_how(folder: Path) -> None:
    as_sentence_transformer(folder, "cls_token", sentence_bert_config={"max_seq_length": 9})
    model = Model.from_base(folder, CLASSES)
    assert model.config.text_encoding == {"pooling": "cls", "prompt": "", "max_length": 9}
    tokens = tiny_tokenizer()(["the goal"], return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[:, 0]
        torch.testing.assert_close(model.get_text_features(**tokens), expected)
    other = Model.from_base(folder, CLASSES, pooling="max", max_length=20)
    assert other.config.text_encoding == {"pooling": "max", "prompt": "", "max_length": 20}


def test_a_prompt_stands_before_every_text(folder: Path, tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "query : "}, "default_prompt_name": "query"}
    as_sentence_transformer(folder, config_sentence_transformers=prompts)
    model = Model.from_base(folder, CLASSES)
    plain = tiny_tokenizer()
    assert model.tokenizer("the goal")["input_ids"] == plain("query : the goal")["input_ids"]
    assert model.tokenizer(["the goal"])["input_ids"] == [plain("query : the goal")["input_ids"]]
    model.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")  # as `pipeline` does
    assert again("the goal")["input_ids"] == plain("query : the goal")["input_ids"]
    assert Model.from_base(folder, CLASSES, prompt="").config.text_encoding["prompt"] == ""


def test_prompts_without_a_default_are_told(folder: Path) -> None:
    as_sentence_transformer(folder, config_sentence_transformers={"prompts": {"query": "query: "}})
    with pytest.warns(UserWarning, match="knows prompts .* none by default"):
        Model.from_base(folder, CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [("Dense", "Dense"), ("lasttoken", "lasttoken"), ("damaged", "damaged"), ("inner", "lies in its folder")],
)
def test_what_is_not_to_be_had(change: str, message: str, folder: Path) -> None:
    as_sentence_transformer(folder, "lasttoken" if change == "lasttoken" else "mean_tokens")
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    if change == "Dense":
        modules.append({"path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    if change == "inner":
        modules[0]["path"] = "0_Transformer"
    path.write_text("[" if change == "damaged" else json.dumps(modules))
    with pytest.raises(BaseModelError, match=message):
        Model.from_base(folder, CLASSES)


@pytest.mark.parametrize("options", [{"pooling": "sum"}, {"max_length": 2}, {"max_length": 99}, {"prompt": 3}])
def test_values_out_of_range(options: dict[str, object], text_base: Callable[..., str]) -> None:
    with pytest.raises(ConfigurationError):
        Model.from_base(text_base(), CLASSES, **options)


def test_roberta_counts_positions_from_after_the_padding(text_base: Callable[..., str]) -> None:
    model = Model.from_base(text_base("roberta"), CLASSES)  # 34 positions, of which two are taken
    assert model.encoding.max_length == 32
    with torch.no_grad():
        model(**model.tokenizer(["goal " * 90], truncation=True, return_tensors="pt"))
        with pytest.raises(ConfigurationError, match="truncation=True"):
            model(**model.tokenizer(["goal " * 90], return_tensors="pt"))
