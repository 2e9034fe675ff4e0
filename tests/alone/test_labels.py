"""Class names to the labels of a pretrained head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_towers import save_processor, tiny_classifier

from taskres_hf import TaskResForImageClassification as Model
from taskres_hf.alone.labels import match_labels
from taskres_hf.errors import ClassNamesError, ConfigurationError

LABELS = ["tabby, tabby cat", "tiger cat", "crane", "crane, machine", "Great_White-Shark", "missile", "missile"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("tiger cat", 1), ("Tiger_Cat", 1), ("tabby, tabby cat", 0), ("Tabby  cat", 0), ("tabby", 0), ("cat", None),
        ("great white shark", 4), ("crane", 2), ("machine", 3), ("missile", None), ("", None),
    ],
)  # fmt: skip
def test_a_name_is_matched_exactly_then_roughly_then_as_a_synonym(name: str, place: int | None) -> None:
    assert match_labels([name], LABELS) == [place]


def test_a_synonym_of_two_labels_is_none() -> None:
    assert match_labels(["drake"], ["duck, drake", "dragon, drake"]) == [None]


def test_the_head_is_used_where_it_knows_all(classifier: Callable[[str], str], spec: dict[str, Any]) -> None:
    folder, names = classifier("vit"), spec["classes"]
    assert Model.from_base(folder, names).config.base_classifier == "head"
    assert Model.from_base(folder, ["red", "blue"]).config.base_classifier == "class_means"
    with pytest.warns(UserWarning, match=r"knows 1 of 2 classes and not 'blue'.*prompt_names"):
        assert Model.from_base(folder, [names[0], "blue"]).config.base_classifier == "class_means"
    assert Model.from_base(folder, names, base_classifier="class_means").config.base_classifier == "class_means"


def test_labels_can_be_given(classifier: Callable[[str], str], spec: dict[str, Any]) -> None:
    folder, (one, other, *_) = classifier("vit"), spec["classes"]
    model = Model.from_base(folder, ["red", "blue"], prompt_names={"red": other, "blue": one})
    known = Model.from_base(folder, [other, one])
    assert model.classifier.base.equal(known.classifier.base)
    assert model.class_names == ["red", "blue"]
    near = spec["classes"][0] + "s"
    with pytest.raises(ClassNamesError, match=f"no label '{near}'.*near are"):
        Model.from_base(folder, ["red", "blue"], prompt_names={"red": near, "blue": one})


def test_a_text_encoder_finds_the_nearest(classifier: Callable[[str], str], base: str, spec: dict[str, Any]) -> None:
    names = list(spec["classes"])
    asked = [f"a {names[0]}", *names[1:]]
    model = Model.from_base(classifier("vit"), asked, text_encoder=base)
    assert model.classifier.base.equal(Model.from_base(classifier("vit"), names).classifier.base)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base_classifier": "head"}, ClassNamesError, "no label 'red'"),
        ({"base_classifier": "text"}, ConfigurationError, "must be 'head'"),
        ({"base_classifier": "class_means", "prompt_names": {"red": "thing 0"}}, ConfigurationError, "class means"),
        ({"prompt_names": {"red": "thing 0", "blue": "thing 0"}}, ClassNamesError, "are one label"),
        ({"prompt_names": {"green": "thing 0"}}, ConfigurationError, "green"),
    ],
)
def test_refused(
    options: dict[str, Any], error: type[Exception], message: str, classifier: Callable[[str], str]
) -> None:
    with pytest.raises(error, match=message):
        Model.from_base(classifier("vit"), ["red", "blue"], **options)


@pytest.mark.parametrize(
    ("labels", "advice"),
    [(["crane", "dog", "crane", "cat"], "id2label"), (["crane, bird", "dog", "crane, lifter", "cat"], "prompt_names")],
)
def test_a_name_that_fits_several_labels_is_never_guessed_at(
    labels: list[str], advice: str, tmp_path: Path, base: str
) -> None:
    tiny_classifier("vit", labels).save_pretrained(tmp_path)
    save_processor(tmp_path)
    for options in ({"base_classifier": "head"}, {"text_encoder": base}, {"prompt_names": {"dog": "dog"}}):
        with pytest.raises(ClassNamesError, match=f"'crane' fits 2 labels.*{advice}"):
            Model.from_base(str(tmp_path), ["crane", "dog"], **options)
    model = Model.from_base(str(tmp_path), ["crane", "dog"], base_classifier="class_means")
    assert model.config.base_classifier == "class_means"


def test_a_text_encoder_finds_no_label_that_is_there_twice(tmp_path: Path, base: str) -> None:
    tiny_classifier("vit", ["crane", "dog", "crane", "cat"]).save_pretrained(tmp_path)
    save_processor(tmp_path)
    model = Model.from_base(str(tmp_path), ["cranes", "cat"], text_encoder=base)
    assert model.config.prompt_names == {"cranes": "dog"}
