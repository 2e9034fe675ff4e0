"""Class names to the labels of a pretrained head: by name, by synonym, or by what a text encoder finds nearest."""

from __future__ import annotations

import difflib
import unicodedata
import warnings
from collections import Counter
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
    return [places[0] if len(places) == 1 else None for places in _fitting(names, labels)]


def _fitting(names: Sequence[str], labels: Sequence[str]) -> list[list[int]]:
    """Places of all labels that fit each name best."""
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
        found.append(sorted(next((one for one in tried if one), ())))
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
    words = [given.get(name, name) for name in names]
    fitting = _fitting(words, labels)
    places = [fits[0] if len(fits) == 1 else None for fits in fitting]
    open_ones = [number for number, place in enumerate(places) if place is None]
    if asked:
        _refuse_several(words, fitting, labels)
    if open_ones and text_encoder is not None:
        # A label that is there twice names no row.
        counts = Counter(labels)
        told = [place for place, label in enumerate(labels) if counts[label] == 1]
        near = nearest_labels([words[number] for number in open_ones], [labels[one] for one in told], text_encoder)
        for number, place in zip(open_ones, near, strict=True):
            places[number] = told[place]
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
        name = words[open_ones[0]]
        close = difflib.get_close_matches(name, labels, n=3, cutoff=0.4)
        hint = f"; near are {', '.join(map(repr, close))}" if close else ""
        raise ClassNamesError(
            f"The base's head has no label {name!r}, and none for {len(open_ones) - 1} more classes{hint}. "
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


def _refuse_several(words: Sequence[str], fitting: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """Refuse a name that fits several labels, which is never guessed at: not by a text encoder either."""
    for word, places in zip(words, fitting, strict=True):
        if len(places) > 1:
            shown = [labels[place] for place in places]
            advice = "Say which with prompt_names={class: label}"
            if len(set(shown)) < len(shown):
                advice = "Tell them apart in id2label of the base's config.json"
            raise ClassNamesError(
                f"{word!r} fits {len(places)} labels of the base's head: {', '.join(map(repr, shown[:3]))}. {advice}, "
                "or give base_classifier='class_means'."
            )
