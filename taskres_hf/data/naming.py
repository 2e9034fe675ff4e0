"""Labels of a source to class ids: by name, by number, or as pairs that are recorded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError
from ..prompts import check_class_names
from .account import shorten
from .reading import natural_key

_WHOLE = re.compile(r"-?(?:0|[1-9]\d*)(?:\.0+)?")
_NO_TEXT = frozenset({"nan", "<na>", "n/a", "na", "#n/a", "null"})  # as pandas reads and writes missing cells
_CODE = re.compile(r"[a-zA-Z]{0,5}[\W_]?\d+")


@dataclass
class Naming:
    """Class names in label order, the id of each label, and label to name where the two differ."""

    names: list[str]
    ids: dict[Any, int]
    pairs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def clean(text: str) -> str:
    """A label as a class name: NFC, no space around it."""
    return unicodedata.normalize("NFC", text).strip()


def _letters(text: str) -> str:
    """What makes a name another one: no case, separators or brackets, but `C`, `C#` and `C++` differ."""
    return "".join(character for character in text.casefold() if character.isalnum() or character in "+#*%$<>=!?~^")


def finder(names: Sequence[str]) -> Callable[[str], int | None]:
    """Label to the position of its name: that of the same text, else the only one of other case and separators."""
    exact = {name: index for index, name in enumerate(names)}
    loose: dict[str, list[int]] = {}
    for name, index in exact.items():
        loose.setdefault(_letters(name), []).append(index)

    def find(label: str) -> int | None:
        near = loose.get(_letters(label), []) if _letters(label) else []
        return exact.get(clean(label), near[0] if len(near) == 1 else None)

    return find


def is_missing(label: Any) -> bool:
    """Whether a cell says that a picture has no label: None, NaN, -1 or empty text."""
    if isinstance(label, str):
        return not label.strip()
    return bool(label is None or label == -1 or label != label)


def labels_of_cells(values: Sequence[Any]) -> list[Any]:
    """Labels as text, whole numbers, or None for none."""
    values = [value.item() if hasattr(value, "item") and not isinstance(value, str) else value for value in values]
    values = [str(value) if isinstance(value, bool) else value for value in values]
    values = [None if is_empty_cell(value) else value for value in values]
    known = [value for value in values if value is not None]
    numbers = all(isinstance(v, (int, float)) or (isinstance(v, str) and _WHOLE.fullmatch(v.strip())) for v in known)
    if numbers and all(float(value).is_integer() for value in known):
        return [None if value is None or int(float(value)) == -1 else int(float(value)) for value in values]
    return values


def is_empty_cell(value: Any) -> bool:
    """Whether a cell of a table says that there is nothing: as `is_missing`, or the text that pandas writes for NaN."""
    if isinstance(value, str) and value.strip().lower() in _NO_TEXT:
        return True
    return not isinstance(value, (list, dict)) and is_missing(value)


def are_measurements(labels: Iterable[Any]) -> bool:
    """Whether labels are numbers (also as text), and not all of them whole."""
    try:
        return not all(float(label).is_integer() for label in labels if label is not None)
    except (TypeError, ValueError):
        return False


def are_codes(labels: Iterable[Any], names: Sequence[str] | None) -> bool:
    """Whether labels are numbers or codes (`3`, `n01440764`), and none of them is among the names."""
    known = {label for label in labels if not is_missing(label)}
    return all(isinstance(label, int) or (_CODE.fullmatch(str(label).strip()) is not None) for label in known) and not (
        known & set(names or ())
    )


def name_classes(train: Iterable[Any], others: Iterable[Any], class_names: Any, where: str) -> Naming:
    """Names and ids of the classes.

    Args:
        train: labels of the training pictures: all text or all whole numbers. others: labels of the other splits.
        class_names: names in label order, a mapping from label to name, or None for the labels themselves.
        where: what the labels are, for messages, such as `class folders`.

    Raises:
        DataError: labels and names cannot be matched, or in more than one way.
    """
    labels = {label for label in train if not is_missing(label)}
    every = labels | {label for label in others if not is_missing(label)}
    if not labels:
        raise DataError("No training picture has a label: there is nothing to train on.")
    mapped = _by_mapping(every, class_names)
    if mapped is not None:
        return mapped
    if all(isinstance(label, int) and not isinstance(label, bool) for label in every):
        return _by_number(every, class_names, where)
    if not all(isinstance(label, str) for label in every):
        kinds = sorted({type(label).__name__ for label in every})
        raise DataError(f"Labels must be class ids or names, one per picture; the {where} hold {kinds}.")
    if class_names is None:
        numbers = all(label.strip().isdecimal() for label in labels)
        ordered = sorted({clean(label) for label in labels}, key=natural_key if numbers else None)
        names = check_class_names(ordered, minimum=1)
        places = {label: find(label) for find in [finder(names)] for label in sorted(every)}
        naming = _paired(names, {label: place for label, place in places.items() if place is not None})
    else:
        naming = _by_text(every, class_names, where)
    similar: dict[str, list[str]] = {}
    for name in naming.names:
        similar.setdefault(_letters(name), []).append(name)
    for group in similar.values():
        if len(group) > 1:
            naming.notes.append(f"Classes that differ in spelling only, and are kept apart: {shorten(group)}.")
    return naming


def _by_mapping(labels: set[Any], class_names: Any) -> Naming | None:
    """Names of a mapping from label to name, if that is what `class_names` is."""
    if not isinstance(class_names, Mapping) or not all(isinstance(value, str) for value in class_names.values()):
        return None
    renamed = {clean(str(key)): value for key, value in class_names.items()}
    if not {clean(str(label)) for label in labels} <= set(renamed):
        return None
    order = sorted(renamed, key=natural_key)
    names = check_class_names([renamed[label] for label in order], minimum=1)
    return _paired(names, {label: order.index(clean(str(label))) for label in labels})


def _by_number(labels: set[int], class_names: Any, where: str) -> Naming:
    if class_names is None:
        raise DataError(
            f"The {where} are plain numbers, without names to make prompts from. Pass class_names=[...] in label order "
            "(--class-names)."
        )
    names = check_class_names(class_names, minimum=1)
    outside = sorted(label for label in labels if not 0 <= label < len(names))
    if outside:
        raise DataError(
            f"Labels {outside[:5]} are outside the {len(names)} classes (0 to {len(names) - 1}). Numbers count from 0; "
            "where yours do not, give a mapping {number: name} (--class-names FILE.json)."
        )
    return Naming(names, {label: label for label in labels}, {str(label): names[label] for label in sorted(labels)})


def _by_text(labels: set[str], class_names: Any, where: str) -> Naming:
    names = check_class_names(class_names, minimum=1)
    find, ordered = finder(names), sorted(labels, key=natural_key)
    ids = {label: place for label in ordered if (place := find(label)) is not None}
    unknown = [label for label in ordered if label not in ids]
    if not unknown:
        return _paired(names, ids)
    advice = "Give a mapping {label: name} as class_names (--class-names FILE.json)."
    if ids:
        raise DataError(
            f"The {where} {shorten(unknown)} are not among class_names ({shorten(names)}), others are. {advice}"
        )
    numbers = [int(re.sub(r"\D", "", label)) for label in unknown if _CODE.fullmatch(label.strip())]
    if len(numbers) == len(unknown) == len(names) and len(set(numbers)) == len(numbers):
        return _paired(names, {label: index for index, label in enumerate(unknown)})
    pairs = ", ".join(f"{label} = {name}" for label, name in zip(unknown[:3], names, strict=False))
    why = (
        f"there are {len(unknown)} labels and {len(names)} names"
        if len(unknown) != len(names)
        else f"they could go by order ({pairs}, ...) or be another set of classes"
    )
    raise DataError(f"The {where} ({shorten(unknown)}) are not class_names ({shorten(names)}): {why}. {advice}")


def _paired(names: Sequence[str], ids: Mapping[Any, int]) -> Naming:
    pairs = {str(label): names[index] for label, index in sorted(ids.items(), key=lambda item: item[1])}
    return Naming(list(names), dict(ids), {label: name for label, name in pairs.items() if label != name})
