"""Class names to the labels of a pretrained head: by name, by synonym, or by what a text encoder finds nearest."""

from __future__ import annotations

import difflib
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from transformers import PreTrainedModel

from ..base_model import load_base
from ..encoders import BaseSource, encode_texts, load_tokenizer
from ..errors import ClassNamesError, ConfigurationError
from ..prompts import resolve_templates

HEAD, CLASS_MEANS = "head", "class_means"  # where the base classifier comes from


def _plain(label: str) -> str:
    """A name without case, underscores, hyphens and runs of spaces."""
    text = unicodedata.normalize("NFKC", label).casefold().replace("_", " ").replace("-", " ")
    return " ".join(text.split())


def match_labels(names: Sequence[str], labels: Sequence[str]) -> list[int | None]:
    """Places of the head's labels for class names: the same name, else the same but for case, underscores and hyphens,
    else one of the synonyms that commas separate in a label, as in ImageNet's. None where there is none, or several.
    """
    exact: dict[str, set[int]] = {}
    plain: dict[str, set[int]] = {}
    synonyms: dict[str, set[int]] = {}
    for place, label in enumerate(labels):
        exact.setdefault(label, set()).add(place)
        plain.setdefault(_plain(label), set()).add(place)
        for part in label.split(","):
            synonyms.setdefault(_plain(part), set()).add(place)
    found = []
    for name in names:
        tried = (exact.get(name), plain.get(_plain(name)), synonyms.get(_plain(name)))
        places: set[int] = next((one for one in tried if one), set())
        found.append(next(iter(places)) if len(places) == 1 else None)
    return found


def nearest_labels(names: Sequence[str], labels: Sequence[str], text_encoder: Any, tokenizer: Any = None) -> list[int]:
    """Places of the labels whose text embeddings are nearest to those of class names, by a dual encoder's text tower.

    Args:
        text_encoder: Hub id or folder of a dual encoder, or one already loaded. tokenizer: found by its name when None.
    """
    source = BaseSource(str(getattr(getattr(text_encoder, "config", None), "_name_or_path", text_encoder)))
    base = text_encoder if isinstance(text_encoder, PreTrainedModel) else load_base(source)[0]
    words = tokenizer or load_tokenizer(source)
    template = resolve_templates(None)[0]
    ours, theirs = (
        F.normalize(encode_texts(base, words, [template.format(one.split(",")[0]) for one in texts]), dim=1)
        for texts in (names, labels)
    )
    return [int(place) for place in (ours @ theirs.T).argmax(dim=1)]


def choose_labels(
    names: Sequence[str],
    given: Mapping[str, str],
    labels: Sequence[str] | None,
    wanted: str | None,
    text_encoder: Any = None,
) -> dict[str, str] | None:
    """The head's label for each class, or None where class means take the head's place.

    Args:
        names: of the classes. given: label by class name, as the user says. labels: of the head; None where the base
            has no head. wanted: `"head"`, `"class_means"` or None
            for the head where it knows every class.

    Raises:
        ClassNamesError: the head is wanted, or labels are given, and a class is none of its own; or two classes are one
            label of it.
        ConfigurationError: `wanted` is something else, or there is no head.
    """
    if wanted not in (None, HEAD, CLASS_MEANS):
        raise ConfigurationError(f"`base_classifier` must be 'head', 'class_means' or None; got {wanted!r}.")
    asked = wanted == HEAD or bool(given) or text_encoder is not None
    if wanted == CLASS_MEANS or labels is None:
        if asked and (given or text_encoder is not None or labels is None):
            why = "class means take its place" if wanted == CLASS_MEANS else "the base model has none"
            raise ConfigurationError(f"A pretrained head's rows are asked for, and {why}. Leave one of the two out.")
        return None
    places = match_labels([given.get(name, name) for name in names], labels)
    open_ones = [number for number, place in enumerate(places) if place is None]
    if open_ones and text_encoder is not None:
        near = nearest_labels([given.get(names[number], names[number]) for number in open_ones], labels, text_encoder)
        for number, place in zip(open_ones, near, strict=True):
            places[number] = place
        open_ones = []
    taken = [place for place in places if place is not None]
    if open_ones and not asked:
        if taken:
            warnings.warn(
                f"The base's head knows {len(taken)} of {len(names)} classes and not {names[open_ones[0]]!r}: class "
                "means of the shots take its place for all. To use it, give each class's label with prompt_names=.",
                stacklevel=4,
            )
        return None
    if open_ones:
        name = given.get(names[open_ones[0]], names[open_ones[0]])
        close = difflib.get_close_matches(name, labels, n=3, cutoff=0.4)
        hint = f"; near are {', '.join(map(repr, close))}" if close else ""
        raise ClassNamesError(
            f"The base's head has no label {name!r}, or several, and {len(open_ones) - 1} more classes like it{hint}. "
            "Give its label with prompt_names={class: label}, or base_classifier='class_means'."
        )
    twice = [number for number, place in enumerate(places) if place in places[:number]]
    if twice:
        one, other = (names[number] for number in (places.index(places[twice[0]]), twice[0]))
        raise ClassNamesError(
            f"The classes {one!r} and {other!r} are one label of the base's head, {labels[places[twice[0]] or 0]!r}: "
            "nothing would tell them apart. Give base_classifier='class_means'."
        )
    return {name: labels[place] for name, place in zip(names, places, strict=True) if place is not None}
