"""Few-shot draws that can be replayed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
)

from .data import LABEL_NAMES, MultiLabelImages, column_values, few_shot_rows, find_column, is_missing
from .errors import DataError, FewShotError


def few_shot_indices(
    labels: Sequence[Any],
    shots: int,
    seed: int = 1,
    *,
    on_short: str = "warn",
    class_names: Sequence[str] | None = None,
) -> list[int]:
    """Positions of `shots` examples of each class.

    The same draw as CoOp's and TaskRes's code: classes in the order their first example appears, `random.sample`
    of a generator seeded once. Where pictures have several labels, at least `shots` pictures that show each class and
    `shots` that do not, see `data.stratified.draw_shots`.

    Args:
        labels: N class ids, or N multi-hot rows of K numbers.
        shots: examples per class, at least 1.
        seed: seed of the draw.
        on_short: a class with fewer examples gives all it has; `"warn"` names it, `"raise"` refuses, `"ignore"` is
            silent. Other classes are never reduced.
        class_names: for the messages.

    Raises:
        FewShotError: `on_short="raise"` and a class is short.
        DataError: `shots` or `on_short` is not valid.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise DataError(f"`shots` must be a whole number of at least 1; got {shots!r}.")
    if on_short not in ("warn", "raise", "ignore"):
        raise DataError(f"`on_short` must be 'warn', 'raise' or 'ignore'; got {on_short!r}.")
    if any(isinstance(label, (tuple, list)) for label in labels):
        return few_shot_rows(labels, shots, seed, class_names, on_short)
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        if label >= 0:
            by_class.setdefault(int(label), []).append(index)
    names = {label: class_names[label] if class_names else str(label) for label in by_class}
    short = {names[label]: len(members) for label, members in by_class.items() if len(members) < shots}
    if short and on_short != "ignore":
        listed = ", ".join(f"{name} ({count})" for name, count in list(short.items())[:10])
        message = f"{len(short)} of {len(by_class)} classes have fewer than {shots} training pictures: {listed}"
        if on_short == "raise":
            raise FewShotError(f"{message}. Add pictures, ask for fewer shots, or allow it with on_short='warn'.")
        warnings.warn(f"{message}. All they have is taken.", stacklevel=2)
    generator = random.Random(seed)
    chosen: list[int] = []
    for members in by_class.values():
        chosen += members if len(members) < shots else generator.sample(members, shots)
    return chosen


def sample_few_shot(
    dataset: Dataset,
    shots: int,
    seed: int = 1,
    *,
    label_column: str | None = None,
    on_short: str = "warn",
    multi_label: bool = False,
    **multi_label_options: Any,
) -> Dataset:
    """`shots` examples of each class as a `Dataset`; arguments as in `few_shot_indices`.

    Rows without a label (None, -1 or empty text) are never drawn.

    Args:
        multi_label: pictures have several labels each, told as in `data.multi_label.MultiLabelImages`, whose arguments
            (`class_names`, `separator`, `label_columns`) are taken too.

    To replay a stored draw: `dataset.select(model.config.few_shot["indices"])`.
    """
    if multi_label or multi_label_options:
        options = {"drop_unlabelled": True, "label_column": label_column, **multi_label_options}
        images = MultiLabelImages(dataset, **options)
        drawn = few_shot_indices(images.labels, shots, seed, on_short=on_short, class_names=images.class_names)
        return dataset.select([images.indices[row] for row in drawn])
    column = find_column(dataset, label_column, "label", LABEL_NAMES, ClassLabel)
    feature = dataset.features[column]
    labels = column_values(dataset, column)
    if isinstance(feature, ClassLabel):
        names, ids = list(feature.names), {index: index for index in range(feature.num_classes)}
    else:
        known = [label for label in dict.fromkeys(labels) if not is_missing(label)]
        names, ids = [str(label) for label in known], {label: index for index, label in enumerate(known)}
    labels = [-1 if is_missing(label) else ids[label] for label in labels]
    return dataset.select(few_shot_indices(labels, shots, seed, on_short=on_short, class_names=names))
