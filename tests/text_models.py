"""Models of texts with random weights and tokenizers made here, small enough to make at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

WORDS = [
    "ball",
    "goal",
    "match",
    "team",
    "coach",
    "score",
    "bake",
    "salt",
    "soup",
    "bread",
    "oven",
    "onion",
    "vote",
    "law",
    "mayor",
    "bill",
    "senate",
    "treaty",
    "the",
    "a",
    "is",
    "about",
    "this",
    "sentence",
    "of",
    "query",
    ":",
    ".",
    "sports",
    "cooking",
    "politics",
    "red",
    "blue",
]
CLASSES = ["cooking", "politics", "sports"]
TEXTS = {
    "sports": ["the goal of the match", "a team and a coach", "score a goal", "the ball", "the coach", "a match"],
    "cooking": ["bake the bread", "salt the soup", "the onion soup", "a bread oven", "the oven", "salt the bread"],
    "politics": ["vote the bill", "the mayor", "the senate law", "a treaty law", "the bill", "a senate vote"],
}  # fmt: skip
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
}
_ROBERTA = {**_SIZES, "max_position_embeddings": 34, "pad_token_id": 1, "type_vocab_size": 1}
# Of each family what makes it small.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "max_position_embeddings": 32}, "roberta": _ROBERTA, "xlm-roberta": _ROBERTA,
    "distilbert": {"dim": 32, "hidden_dim": 37, "n_layers": 2, "n_heads": 4, "vocab_size": 60,
                   "max_position_embeddings": 32},
    "mpnet": {**_SIZES, "max_position_embeddings": 34, "pad_token_id": 1},
    "electra": {**_SIZES, "embedding_size": 32, "max_position_embeddings": 32},
    "modernbert": {**_SIZES, "max_position_embeddings": 32, "pad_token_id": 1, "cls_token_id": 2, "sep_token_id": 3,
                   "bos_token_id": 2, "eos_token_id": 3, "global_attn_every_n_layers": 1},
}  # fmt: skip


def tiny_tokenizer() -> Any:
    """A tokenizer of whole words, with a token before and after each text."""
    vocabulary = {word: place for place, word in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def tiny_text_model(family: str, labels: Sequence[str] | None = None) -> Any:
    """A model of a family with random weights; with labels a classifier, its head large enough to have an opinion."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    if labels is None:
        return AutoModel.from_config(config).eval()
    config.id2label, config.label2id = dict(enumerate(labels)), {label: place for place, label in enumerate(labels)}
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "classifier" in name:
                weight.normal_(0.0, 0.5)
    return model


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a random model of a family, with a tokenizer; with labels a classifier."""
    made: dict[Any, str] = {}

    def make(family: str = "bert", labels: tuple[str, ...] | None = None) -> str:
        key = family, labels
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_text_model(family, labels).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


def as_sentence_transformer(folder: Path, pooling: str = "cls_token", **files: Any) -> Path:
    """The files by which sentence-transformers says how a model pools."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {
        "word_embedding_dimension": 32,
        f"pooling_mode_{pooling}": True,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
