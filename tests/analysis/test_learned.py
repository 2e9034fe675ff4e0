"""What a classifier is said to have learned is what was put into it, and what its pictures show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import tagger

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.analysis import learned
from taskres_hf.analysis.learned import what_it_learned
from taskres_hf.base_model import has_text_tower
from taskres_hf.errors import ConfigurationError
from taskres_hf.residual import TaskResClassifier

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def head() -> TaskResClassifier:
    """Texts at right angles and of one length, so that what is put in can be told by hand."""
    return TaskResClassifier(3 * torch.eye(4, 8), alpha=0.5)


def test_nothing_learned_is_said_of_nothing(head: TaskResClassifier) -> None:
    rows = learned.class_changes(head, NAMES)
    assert all(row["kept"] == 1 and row["length"] == 0 and row["towards"] == row["away"] == [] for row in rows)
    assert learned.separated_rows(head, NAMES) == []
    assert not learned.changed_words(head, NAMES, ["x"] * 8, torch.eye(8))["a"]["towards"]


@pytest.mark.parametrize("plain", [True, False])
def test_a_row_that_was_moved_towards_a_class_says_so(head: TaskResClassifier, plain: bool) -> None:
    weight = head.base.clone()
    weight[0] += 2 * head.base[2]  # a to c
    if plain:
        with torch.no_grad():
            head.residual.copy_((weight - head.base) / head.alpha)
    else:  # rows of their own lengths and a factor, as recipe auto makes them
        head.set_weight(weight / 3, normalize_weight=False, logit_scale_factor=0.5, class_bias=[0.0, 1.0, 2.0, 3.0])
    rows = learned.class_changes(head, NAMES)
    assert rows[0]["name"] == "a"
    assert rows[0]["towards"][0][0] == "c"
    assert rows[0]["after"][0] == "c"
    assert rows[0]["length"] == pytest.approx(2.0, rel=1e-5)
    assert rows[0]["kept"] < min(row["kept"] for row in rows[1:])
    assert [row["bias"] for row in rows if row["name"] == "d"] == [None if plain else 3.0]
    pair = learned.separated_rows(head, NAMES)
    assert all(set(row["classes"]) != {"a", "c"} and row["after"] < row["before"] for row in pair)


def test_scale_and_what_all_rows_share_are_nothing_learned(head: TaskResClassifier) -> None:
    shared = torch.linspace(-1, 1, 8)
    head.set_weight(F.normalize(head.base, dim=1) + shared, normalize_weight=False, logit_scale_factor=0.25)
    found = learned.Learned(head)
    assert torch.allclose(found.kept, torch.ones(4, dtype=torch.float64))
    assert not found.added.any()


def test_on_the_image_side_there_is_one_row() -> None:
    head = TaskResClassifier(torch.eye(3, 8), side="image")
    with torch.no_grad():
        head.residual.copy_(head.base[1:2])
    (row,) = learned.class_changes(head, NAMES[:3])
    assert row["towards"][0][0] == "b"
    assert row["length"] == pytest.approx(0.5)


def test_a_single_class() -> None:
    head = TaskResClassifier(torch.ones(1, 4))
    assert learned.class_changes(head, ["only"])[0]["before"] == []


def test_words_are_said_only_if_pictures_agree(head: TaskResClassifier) -> None:
    words = [f"w{number}" for number in range(40)]
    embeds = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    embeds[7] = torch.tensor([0.0, 0, 0, 0, 9, 0, 0, 0])
    weight = head.base.clone()
    weight[1, 4] = 3.0
    head.set_weight(weight)
    told = learned.changed_words(head, NAMES, words, embeds)
    assert told["b"]["towards"][0][0] == "w7"
    labels = torch.arange(4).repeat(3)
    pictures = torch.eye(4, 8)[labels] + 0.5
    pictures[labels == 1, 4] = 4.0
    agreeing = learned.changed_words(head, NAMES, words, embeds, image_embeds=pictures, labels=labels)
    assert agreeing["b"]["towards"][0][0] == "w7"
    pictures[labels == 1, 4] = -4.0
    denying = learned.changed_words(head, NAMES, words, embeds, image_embeds=pictures, labels=labels)
    assert "w7" not in dict(denying["b"]["towards"])


def test_pairs_count_pictures_of_both_classes() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2])
    zero_shot, trained = F.one_hot(torch.tensor([1, 0, 0, 2, 0]), 3), F.one_hot(torch.tensor([0, 1, 1, 1, 2]), 3)
    rows = learned.separated_pairs(trained.float(), zero_shot.float(), labels)
    assert [(row["classes"], row["before"], row["after"]) for row in rows] == [
        ((0, 1), 2, 1), ((0, 2), 1, 0), ((1, 2), 0, 1),
    ]  # fmt: skip
    assert [row["mended"] for row in rows] == [[0, 2], [4], []]
    assert [row["confused"] for row in rows] == [[1], [], [3]]


def test_words_of_a_real_classifier(
    model: TaskResCLIPForImageClassification, splits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text tower is loaded once; what words say of unseen pictures is right more often than not."""
    monkeypatch.setenv("TASKRES_CACHE", str(tmp_path / "cache"))
    trainer = TaskResTrainer(model, TaskResTrainingArguments(shots=8, disable_tqdm=True), splits["train"])
    trainer.train()
    model.save_pretrained(tmp_path / "trained")
    test = trainer.embed(splits["test"])
    TaskResCLIPForImageClassification.from_pretrained(tmp_path / "trained")  # keeps the base classifier
    model = TaskResCLIPForImageClassification.from_pretrained(tmp_path / "trained")
    assert not has_text_tower(model.clip)
    words = learned.default_words()
    found = what_it_learned(model, image_embeds=test.image_embeds[0], labels=test.labels)
    assert sorted(row["name"] for row in found["classes"]) == sorted(model.class_names)
    assert all(len(row["words_towards"]) <= 3 for row in found["classes"])
    assert sum(pair["before"] for pair in found["pairs"]) > sum(pair["after"] for pair in found["pairs"])
    added = learned.word_scores(learned.Learned(model.classifier).directions(), learned.embed_words(model, words))
    seen = learned.word_scores(
        learned.picture_directions(test.image_embeds[0], test.labels, len(added)), learned.embed_words(model, words)
    )
    assert ((added * seen)[added.abs() > 2] > 0).double().mean() > 0.5
    monkeypatch.setattr(learned, "load_base_fp32", lambda *_: pytest.fail("the text tower was loaded again"))
    again = what_it_learned(TaskResCLIPForImageClassification.from_pretrained(tmp_path / "trained"))
    assert [row["name"] for row in again["classes"]] == [row["name"] for row in found["classes"]]
    assert "words_towards" not in what_it_learned(model, [])["classes"][0]


@pytest.mark.parametrize("words", [[""], ["red", 3]])
def test_words_must_be_texts(model: TaskResCLIPForImageClassification, words: list[Any]) -> None:
    with pytest.raises(ConfigurationError, match="words"):
        what_it_learned(model, words)


def test_several_labels_are_refused(model: TaskResCLIPForImageClassification) -> None:
    with pytest.raises(ConfigurationError, match="several"):
        what_it_learned(tagger(model))


def test_the_words_shipped_are_all_different() -> None:
    words = learned.default_words()
    assert len(words) == len(set(words)) > 100
