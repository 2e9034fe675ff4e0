"""Labelled pictures to train on and to measure on, with classes numbered and an account of what was read."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, List

from ..errors import DataError
from ..storage import is_path
from .labelled import (
    LABEL_NAMES,
    LabelledImages,
    Naming,
    are_codes,
    class_counts,
    column_values,
    find_column,
    finder,
    is_missing,
    name_classes,
    rename_classes,
)
from .multi_label import ONE_LABEL_EACH, MultiLabel, MultiLabelImages, flat
from .reading import Account, LeftOut, Reading, SplitAccount, SplitReading, natural_key, shorten, split_name
from .sources import SourceOptions, read_source
from .stratified import set_aside_share
from .texts import LabelledTexts, TextCells, read_texts


class TrainingData(NamedTuple):
    """What `load_training_data` gives: pictures to train on, pictures to measure on or None, and the account."""

    train: LabelledImages
    held_out: LabelledImages | None
    account: Account


def load_training_data(
    source: Any,
    *,
    train_split: str | None = None,
    eval_split: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Any = None,
    drop_unlabelled: bool = False,
    holdout: float | None = None,
    seed: int = 1,
    class_folder: str | None = None,
    multi_label: bool = False,
    label_separator: str | None = None,
    label_columns: Sequence[str] | str | None = None,
    texts: bool = False,
) -> TrainingData:
    """Read labelled pictures from anything that holds them; what was read as what is in the account.

    Args:
        source: a Hub dataset id, a `Dataset` or `DatasetDict`, or a path.
        train_split: split to train on; by default the training split or, where nothing is split, everything.
        eval_split: split to hold out; by default test, else validation, else none. `"none"` holds nothing out.
        config_name: configuration of a Hub dataset.
        revision, token, cache_dir: as in `datasets.load_dataset`.
        image_column, label_column: columns of a table or dataset; recognised when None.
        class_names: names in label order, or a mapping from label (such as a folder's name) to name.
        drop_unlabelled: leave out rows without a label instead of refusing them.
        holdout: share of the training pictures, per class, to hold out instead of a split.
        seed: seed of that draw.
        class_folder: which folder is the class where folders lie in folders: `"first"` (below the split) or `"last"`
            (that holds the picture). By default it is the first, and two possible readings are refused.
        multi_label: pictures have several labels each, or none: lists, text with a separator, vectors of 0 and 1, or
            one column per class. The sets are then `MultiLabelImages`.
        label_separator: between labels in one cell: `|`, `;`, `,` or a space; recognised when None.
        label_columns: names of the columns of 0 and 1, one per class; `"auto"` for all that hold nothing else.
        texts: texts instead of pictures (`data.texts`); `image_column` is then the column of texts.

    Returns:
        `(train, held_out, account)`; both sets have the same classes in the same order.

    Raises:
        DataError: nothing readable, no such split or column, or more than one way to read it.
    """
    if holdout is not None and eval_split not in (None, "none"):
        raise DataError("Choose one: holdout= takes part of the training split, eval_split= another split.")
    given = SourceOptions(
        config_name, revision, token, cache_dir, image_column, label_column, train_split, eval_split, class_folder,
        class_names, MultiLabel.asked(multi_label, label_separator, label_columns), texts,
    )  # fmt: skip
    reading = _read(source, given)
    trained = _choose_training(reading, train_split)
    options = {
        "image_column": image_column,
        "label_column": label_column,
        "multi_label": given.multi_label,
        "texts": texts,
    }
    class_names = reading.class_names if class_names is None else class_names
    held = None if holdout is not None else _choose_held_out(reading, trained, eval_split, options)
    train, naming = _labelled(trained, [held] if held else [], class_names, drop_unlabelled, options)
    held_out = None
    left_out = list(reading.left_out) + _unlabelled(trained, train)
    if held is not None:
        held_out, lost = _aligned(held, train.class_names, naming, class_names, drop_unlabelled, options)
        left_out += lost
    if holdout is not None:
        train, held_out = set_aside_share(train, holdout, seed)
        reading.notes.append(
            f"{len(held_out)} {train.noun}s ({holdout:g} of each class, seed {seed}) are held out of train."
        )
    splits = _account_splits(reading, trained, held, train, held_out, options)
    notes = [*reading.notes, *naming.notes, *_class_notes(reading, train, held_out)]
    account = Account(
        _public_name(source), reading.kind, splits, tuple(left_out), naming.pairs, tuple(notes), train.noun
    )
    for images in (train, held_out):
        if images is not None:
            images.account = account
            _note_how(images, reading, given.multi_label)
    return TrainingData(train, held_out, account)


def load_evaluation_data(
    source: Any,
    split: str | None = None,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Any = None,
    default_names: Sequence[str] | None = None,
    drop_unlabelled: bool = False,
    class_folder: str | None = None,
    multi_label: bool = False,
    label_separator: str | None = None,
    label_columns: Sequence[str] | str | None = None,
    texts: bool = False,
) -> LabelledImages:
    """One split to measure on, with `account` set; other arguments as in `load_training_data`.

    Args:
        split: its name; by default test, else validation, else the only one there is.
        default_names: names to use when labels are plain numbers and `class_names` is None.

    Raises:
        DataError: as `load_training_data`; never another split than the one asked for.
    """
    given = SourceOptions(
        config_name, revision, token, cache_dir, image_column, label_column, None, split, class_folder,
        class_names if class_names is not None else default_names,
        MultiLabel.asked(multi_label, label_separator, label_columns), texts,
    )  # fmt: skip
    reading = _read(source, given)
    options = {
        "image_column": image_column,
        "label_column": label_column,
        "multi_label": given.multi_label,
        "texts": texts,
    }
    class_names = reading.class_names if class_names is None else class_names
    chosen = (
        _measurable(_named(reading, split), options) if split is not None else _default_held_out(reading, None, options)
    )
    if chosen is None and len(reading.splits) == 1:
        chosen = reading.splits[0]
    if chosen is None:
        raise DataError(f"Which split is to be measured? There are {_listed(reading)}: name one with split= (--split).")
    images, naming = _labelled(chosen, [], class_names, drop_unlabelled, options, default_names)
    splits = _account_splits(reading, None, chosen, None, images, options)
    left_out = [*reading.left_out, *_unlabelled(chosen, images)]
    notes = (*reading.notes, *naming.notes)
    images.account = Account(
        _public_name(source), reading.kind, splits, tuple(left_out), naming.pairs, notes, images.noun
    )
    _note_how(images, reading, given.multi_label)
    return images


def _note_how(images: LabelledImages, reading: Reading, asked: MultiLabel | None) -> None:
    """Several labels per picture remember how they were written."""
    if isinstance(images, MultiLabelImages) and asked is not None:
        images.asked = MultiLabel(reading.separator or asked.separator, reading.class_names or asked.columns)


def _read(source: Any, given: SourceOptions) -> Reading:
    """`read_source` or `read_texts`; the first gives one label a picture for some sources where several are asked."""
    reading = (read_texts if given.texts else read_source)(source, given)
    for split in reading.splits if given.multi_label else []:
        if split.dataset is None and not all(label is None or isinstance(label, tuple) for label in split.labels):
            raise DataError(ONE_LABEL_EACH.format(name=_public_name(source)))
    return reading


def _public_name(source: Any) -> str:
    """A Hub id as it is, of a path the last part only, of an object in memory its kind."""
    if not isinstance(source, (str, os.PathLike)):
        return type(source).__name__
    return Path(source).absolute().name if is_path(source) else str(source)


# ---------------------------------------------------------------------- choosing splits


def _listed(reading: Reading) -> str:
    return shorten([split.name for split in reading.splits], 10)


def _named(reading: Reading, name: str) -> SplitReading:
    split = reading.split(name)
    if split is None:
        raise DataError(f"There is no split {name!r}; there are {_listed(reading)}.")
    return split


def _choose_training(reading: Reading, name: str | None) -> SplitReading:
    if name is not None:
        return _named(reading, name)
    split = reading.splits[0] if reading.chosen else reading.split("train")
    if split is None and len(reading.splits) == 1 and split_name(reading.splits[0].name) is None:
        split = reading.splits[0]
    if split is None:
        raise DataError(
            f"There is no training split; there are {_listed(reading)}. Name the one to train on with train_split= "
            "(--train-split)."
        )
    return split


def _choose_held_out(
    reading: Reading, trained: SplitReading, name: str | None, options: Mapping[str, Any]
) -> SplitReading | None:
    if name == "none":
        return None
    if name is None:
        return _default_held_out(reading, trained, options)
    split = _named(reading, name)
    if split is trained:
        raise DataError(
            f"The split {split.name!r} cannot be trained on and measured on. Choose another eval_split (--eval-split), "
            "or set a part aside with holdout=0.2 (--holdout 0.2)."
        )
    return _measurable(split, options)


def _measurable(split: SplitReading, options: Mapping[str, Any]) -> SplitReading:
    if not any(not is_missing(label) for label in _labels(split, options)):
        raise DataError(
            f"The split {split.name!r} has no labels, so nothing can be measured on its {len(split)} {_noun(options)}."
        )
    return split


def _default_held_out(
    reading: Reading, trained: SplitReading | None, options: Mapping[str, Any]
) -> SplitReading | None:
    """Test, else validation: the first that has labels."""
    for name in ("test", "validation"):
        split = reading.split(name)
        if split is not None and split is not trained and len(split):
            if any(not is_missing(label) for label in _labels(split, options)):
                return split
            reading.notes.append(
                f"{split.name}: {len(split)} {_noun(options)} without labels; nothing is measured on them."
            )
    return None


def _noun(options: Mapping[str, Any]) -> str:
    return "texts" if options["texts"] else "pictures"


def _labels(split: SplitReading, options: Mapping[str, Any]) -> Sequence[Any]:
    if split.dataset is None:
        return split.labels
    if options["multi_label"] is not None and options["multi_label"].columns is not None:
        return [()] * len(split)
    kind = ClassLabel if options["multi_label"] is None else List
    try:
        column = find_column(split.dataset, options["label_column"], "label", LABEL_NAMES, kind)
    except DataError:
        return []
    return column_values(split.dataset, column)


# ---------------------------------------------------------------------- labels to classes


def _labelled(
    split: SplitReading,
    others: Sequence[SplitReading],
    class_names: Any,
    drop_unlabelled: bool,
    options: Mapping[str, Any],
    default_names: Sequence[str] | None = None,
) -> tuple[LabelledImages, Naming]:
    if split.dataset is not None:
        images = _of_dataset(split, class_names, default_names, drop_unlabelled, options)
        return images, _naming_of(split.dataset, images, class_names)
    labels = flat(split.labels) if options["multi_label"] else split.labels
    elsewhere = [
        label for other in others for label in (flat(other.labels) if options["multi_label"] else other.labels)
    ]
    names = default_names if class_names is None and are_codes(labels, default_names) else class_names
    naming = name_classes(labels, elsewhere, names, split.origin or "labels")
    return _from_labels(split, naming, drop_unlabelled), naming


def _of_dataset(
    split: SplitReading, class_names: Any, default_names: Any, drop_unlabelled: bool, options: Mapping[str, Any]
) -> LabelledImages:
    asked, columns = options["multi_label"], {key: options[key] for key in ("image_column", "label_column")}
    kind: Any = LabelledImages
    if options["texts"]:
        kind, columns["text_column"] = LabelledTexts, columns.pop("image_column")
    names = {"class_names": class_names, "default_names": default_names, "drop_unlabelled": drop_unlabelled}
    assert split.dataset is not None
    if asked is None:
        images = kind(split.dataset, **names, **columns)
    else:
        how = {"separator": asked.separator, "label_columns": asked.columns}
        images = MultiLabelImages(split.dataset, **names, **columns, **how)
    images.split = split.name
    return images  # type: ignore[no-any-return]


def _naming_of(dataset: Dataset, images: LabelledImages, class_names: Any) -> Naming:
    """Which columns were used, and what classes of the dataset are called."""
    if isinstance(images, MultiLabelImages):
        note = f"Columns: pictures {images.image_column!r}, several labels a picture {images.label_column!r}."
        return Naming(images.class_names, {}, {}, [note])
    feature = dataset.features[images.label_column]
    found = column_values(dataset, images.label_column)
    pairs = {
        str(found[row]): images.class_names[label] for row, label in zip(images.indices, images.labels, strict=True)
    }
    if isinstance(feature, ClassLabel) and class_names is not None:
        names, order = rename_classes(feature.names, class_names, images.label_column)
        pairs = {old: names[order.get(index, index)] for index, old in enumerate(feature.names)}
    elif isinstance(feature, ClassLabel):
        pairs = {}
    pairs = {old: name for old, name in sorted(pairs.items(), key=lambda pair: natural_key(pair[0])) if old != name}
    others = [name for name in dataset.column_names if name not in (images.image_column, images.label_column)]
    also = f" (not used: {shorten(others)})" if others else ""
    note = f"Columns: {images.noun}s {images.image_column!r}, labels {images.label_column!r}{also}."
    return Naming(images.class_names, {}, pairs, [note])


def _from_labels(split: SplitReading, naming: Naming, drop_unlabelled: bool) -> LabelledImages:
    assert split.cells is not None
    if any(isinstance(label, tuple) for label in split.labels):
        how: dict[str, Any] = {"split": split.name, "drop_unlabelled": drop_unlabelled}
        return MultiLabelImages.from_sets(split.cells, split.labels, naming, **how)
    ids = [-1 if is_missing(label) else naming.ids[label] for label in split.labels]
    kind = LabelledTexts if isinstance(split.cells, TextCells) else LabelledImages
    return kind.from_cells(split.cells, ids, naming.names, split=split.name, drop_unlabelled=drop_unlabelled)


def _aligned(
    split: SplitReading,
    names: list[str],
    naming: Naming,
    class_names: Any,
    drop_unlabelled: bool,
    options: Mapping[str, Any],
) -> tuple[LabelledImages, list[LeftOut]]:
    """The held-out pictures with the training classes; those of other classes are left out and named."""
    if options["multi_label"] is not None:
        return _aligned_sets(split, names, naming, class_names, drop_unlabelled, options)
    if split.dataset is None:
        lost = Counter(label for label in split.labels if not is_missing(label) and label not in naming.ids)
        rows = [row for row, label in enumerate(split.labels) if label not in lost]
        _check_common(split, rows, lost, names)
        assert split.cells is not None
        part = SplitReading(split.name, split.origin, None, split.cells.select(rows), [split.labels[r] for r in rows])
        return _from_labels(part, naming, drop_unlabelled), _foreign(split, lost, _noun(options))
    images = _of_dataset(split, class_names, names, drop_unlabelled, options)
    find = finder(names)
    known = {name for name in images.class_names if find(name) is not None}
    lost = Counter(name for name in map(images.class_names.__getitem__, images.labels) if name not in known)
    rows = [row for row, label in enumerate(images.labels) if images.class_names[label] not in lost]
    _check_common(split, rows, lost, names)
    return (images.select(rows) if lost else images).aligned(names), _foreign(split, lost, _noun(options))


def _aligned_sets(
    split: SplitReading, names: list[str], naming: Naming, class_names: Any, drop_unlabelled: bool, options: Any
) -> tuple[LabelledImages, list[LeftOut]]:
    """The held-out pictures with the training classes; labels of other classes are left out, their pictures stay."""
    if split.dataset is None:
        lost = Counter(label for label in flat(split.labels) if label not in naming.ids)
        sets = [None if row is None else tuple(label for label in row if label in naming.ids) for row in split.labels]
        return _from_labels(replace(split, labels=sets), naming, drop_unlabelled), _foreign(split, lost, "labels")
    images = _of_dataset(split, class_names, names, drop_unlabelled, options)
    find = finder(names)
    unknown = [place for place, name in enumerate(images.class_names) if find(name) is None]
    lost = Counter({images.class_names[place]: sum(bool(row[place]) for row in images.labels) for place in unknown})
    images.labels = [tuple(0.0 if place in unknown else x for place, x in enumerate(row)) for row in images.labels]
    return images.aligned(names), _foreign(split, +lost, "labels")


def _check_common(split: SplitReading, rows: Sequence[int], lost: Mapping[str, int], names: Sequence[str]) -> None:
    if not rows:
        raise DataError(
            f"The split {split.name!r} has no class of the training split: it has {shorten(lost)}, training has "
            f"{shorten(names)}. Rename its classes, give a mapping {{label: name}} as class_names (--class-names "
            "FILE.json), or measure on another with eval_split= (--eval-split)."
        )


def _foreign(split: SplitReading, lost: Mapping[str, int], what: str = "pictures") -> list[LeftOut]:
    if not lost:
        return []
    row = LeftOut(f"{split.name} {what} of classes without a training picture", sum(lost.values()), tuple(lost))
    warnings.warn(f"{row.count} {row.reason} are left out: {shorten(lost)}.", stacklevel=4)
    return [row]


def _unlabelled(split: SplitReading, images: LabelledImages) -> list[LeftOut]:
    count = len(split) - len(images)
    return [LeftOut(f"{split.name} rows without a label", count)] if count else []


# ---------------------------------------------------------------------- the account


def _account_splits(
    reading: Reading,
    trained: SplitReading | None,
    held: SplitReading | None,
    train: LabelledImages | None,
    held_out: LabelledImages | None,
    options: Mapping[str, Any],
) -> tuple[SplitAccount, ...]:
    rows = []
    measured = "held out" if trained is not None else "measured"
    for split in reading.splits:
        images, use = (train, "train") if split is trained else (held_out, measured) if split is held else (None, "")
        if images is not None:
            counts = class_counts(images.labels, images.class_names)
            total = len(images) if isinstance(images, MultiLabelImages) else None
            rows.append(SplitAccount(split.name, split.origin, use, counts, total=total))
            continue
        features = {} if split.dataset is None else split.dataset.features
        typed = next((feature.names for feature in features.values() if isinstance(feature, ClassLabel)), None)
        labels = [label for label in _labels(split, options) if not is_missing(label)]
        if options["multi_label"] is not None:
            rows.append(SplitAccount(split.name, split.origin, total=len(split)))
            continue
        known = Counter(typed[label] if typed and isinstance(label, int) else str(label) for label in labels)
        rows.append(SplitAccount(split.name, split.origin, "not used", dict(known), len(split) - len(labels)))
    if held is None and held_out is not None and trained is not None:
        counts = class_counts(held_out.labels, held_out.class_names)
        total = len(held_out) if isinstance(held_out, MultiLabelImages) else None
        rows.append(SplitAccount("holdout", trained.name, "held out", counts, total=total))
    return tuple(rows)


def _class_notes(reading: Reading, train: LabelledImages, held_out: LabelledImages | None) -> list[str]:
    notes = []
    counts = class_counts(train.labels, train.class_names)
    absent = [name for name, count in counts.items() if not count]
    if absent:
        notes.append(f"Classes without a training {train.noun}: {shorten(absent)}.")
    empty = [name for name in reading.empty if name not in absent]
    if empty:
        notes.append(f"Folders without any picture, which make no class: {shorten(empty)}.")
    if held_out is not None:
        measured = class_counts(held_out.labels, held_out.class_names)
        unmeasured = [name for name, count in measured.items() if not count and counts[name]]
        if unmeasured:
            notes.append(f"Classes without a {train.noun} in {held_out.split}: {shorten(unmeasured)}.")
    return notes
