"""Class names and templates."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from datasets import ClassLabel

from taskres_hf.errors import ClassNamesError, ConfigurationError
from taskres_hf.prompts import check_class_names, class_prompts, named_templates, resolve_templates


def test_one_prompt_per_template_and_class() -> None:
    prompts = class_prompts(["tabby_cat", "beagle"], ["a photo of a {}.", "art of the {}."])
    assert prompts == [
        ["a photo of a tabby cat.", "art of the tabby cat."],
        ["a photo of a beagle.", "art of the beagle."],
    ]


def test_underscores_kept_as_the_published_code_does() -> None:
    assert class_prompts(["tabby_cat"], "a {}.", underscores="keep") == [["a tabby_cat."]]


def test_descriptions_alone_or_with_templates() -> None:
    sentences = {"cat": ["It purrs.", "It has whiskers."], "dog": ["It barks."]}
    assert class_prompts(["cat", "dog"], descriptions=sentences) == [sentences["cat"], sentences["dog"]]
    assert class_prompts(["dog"], "a {}.", descriptions=sentences) == [["a dog.", "It barks."]]
    with pytest.raises(ConfigurationError, match="missing for"):
        class_prompts(["cat", "cow"], descriptions=sentences)


def test_named_sets() -> None:
    sets = named_templates()
    assert (len(sets["clip-80"]), len(sets["clip-7"]), len(sets["imagenet"])) == (80, 7, 8)
    assert resolve_templates("dtd") == ["{} texture."]
    assert all(template.count("{}") == 1 for templates in sets.values() for template in templates)


@pytest.mark.parametrize("bad", ["no place for a name", [], ["a {} and a {}"], "a {name}", [3]])
def test_bad_templates(bad: object) -> None:
    with pytest.raises(ConfigurationError):
        resolve_templates(bad)  # type: ignore[arg-type]


def test_class_names_from_what_users_have() -> None:
    assert check_class_names(ClassLabel(names=["b", "a"])) == ["b", "a"]
    assert check_class_names({1: "b", 0: "a"}) == ["a", "b"]
    assert check_class_names({"0": "a", "1": "b"}) == ["a", "b"]
    assert check_class_names({"b": 1, "a": 0}) == ["a", "b"]
    assert check_class_names([" cat ", "dog"]) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, "No class names"),
        ([], "at least 2"),
        (["cat"], "at least 2"),
        ("cat", "single string"),
        (["cat", " "], "empty"),
        (["cat", "cat"], "must differ"),
        (["café", unicodedata.normalize("NFD", "café")], "must differ"),
        (["cat", 3], "strings"),
        ({0: "a", 2: "b"}, "without gaps"),
    ],
)
def test_bad_class_names(names: object, message: str) -> None:
    with pytest.raises(ClassNamesError, match=message):
        check_class_names(names)


def test_meaningless_names_are_pointed_out() -> None:
    with pytest.warns(UserWarning, match="say nothing"):
        check_class_names(["n02123045", "17"])


def test_a_string_of_description_is_one_sentence() -> None:
    assert class_prompts(["cat", "dog"], descriptions={"cat": "It purrs.", "dog": ["It barks."]}) == [
        ["It purrs."], ["It barks."],
    ]  # fmt: skip
    for bad in ({"cat": 3}, {"cat": [3]}, {"cat": None}, ["It purrs."]):
        with pytest.raises(ConfigurationError, match=r"sentences"):
            class_prompts(["cat"], descriptions=bad)
    for bad_names in ({"cat": 3}, {"cat": " "}, ["cat"]):
        with pytest.raises(ConfigurationError, match="prompt_names"):
            class_prompts(["cat"], "a {}.", prompt_names=bad_names)


@pytest.mark.parametrize(
    ("one", "other"), [("red fish", "red_fish"), ("Cat", "cat"), ("a  b", "a b"), ("fish", "\ufb01sh"), ("A_B", "a b")]
)
def test_names_that_hardly_differ_are_named(one: str, other: str) -> None:
    with pytest.warns(UserWarning, match="1 pair of class names") as caught:
        assert len(check_class_names([one, "dog", other])) == 3
    assert repr(one) in str(caught[0].message)
    assert repr(other) in str(caught[0].message)


@pytest.mark.parametrize("templates", [3, len, 2.5])
def test_templates_of_another_type(templates: Any) -> None:
    with pytest.raises(ConfigurationError, match="one template or several"):
        resolve_templates(templates)


def test_names_of_nothing_visible() -> None:
    for name in ("\u200b", "_", " \u2060 "):
        with pytest.raises(ClassNamesError, match="must not be empty"):
            check_class_names([name, "cat"])
    with pytest.warns(UserWarning, match="1 pair of class names"):
        check_class_names(["cat", "cat\u200b", "dog"])


def test_bytes_that_are_no_text() -> None:
    """As in the name of a folder made on another system."""
    with pytest.raises(ConfigurationError, match=r"bytes that are not text.*prompt_names="):
        class_prompts(["gar\udce7on", "girl"])
    assert class_prompts(["gar\udce7on", "girl"], prompt_names={"gar\udce7on": "boy"})[0] == ["a photo of a boy."]
