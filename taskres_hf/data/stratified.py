"""Draws and folds of pictures with several labels, by iterative stratification."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import DataError, FewShotError
from .labelled import LabelledImages
from .reading import shorten


def positives(labels: Iterable[Sequence[float]], classes: int) -> list[int]:
    """Number of pictures that show each class."""
    counts = Counter(place for row in labels for place, value in enumerate(row) if value)
    return [counts.get(place, 0) for place in range(classes)]


def draw_shots(labels: Sequence[Sequence[float]], shots: int, seed: int) -> list[int]:
    """Positions of pictures such that `shots` show each class, and `shots` do not, where there are so many.

    Greedy in the order of iterative stratification (Sechidis et al. 2011): again and again, of the classes (and their
    absences) that still lack pictures the one with the fewest left gets one, drawn with a generator seeded once; a
    picture counts for all its labels. Frequent labels end with more than `shots`.
    """
    classes = len(labels[0]) if labels else 0
    wants = [[2 * place + (not row[place]) for place in range(classes)] for row in labels]
    left: list[list[int]] = [[] for _ in range(2 * classes)]
    for position, row in enumerate(wants):
        for want in row:
            left[want].append(position)
    lacking = [min(shots, len(members)) for members in left]
    generator = random.Random(seed)
    order = list(range(len(labels)))
    generator.shuffle(order)
    rank = {position: place for place, position in enumerate(order)}
    queues = [sorted(members, key=rank.__getitem__, reverse=True) for members in left]
    remaining = [len(members) for members in left]
    drawn: list[int] = []
    taken = [False] * len(labels)
    while any(count > 0 for count in lacking):
        want = min((w for w, count in enumerate(lacking) if count > 0), key=lambda w: (remaining[w], w))
        position = queues[want].pop()
        if taken[position]:
            continue
        taken[position] = True
        drawn.append(position)
        for other in wants[position]:
            lacking[other] -= 1
            remaining[other] -= 1
    return drawn


def fold_of_each(labels: Sequence[Sequence[float]], shares: Sequence[float], seed: int) -> list[int]:
    """The part of each of N multi-hot rows, by iterative stratification (Sechidis, Tsoumakas and Vlahavas, ECML PKDD
    2011): parts have about the given shares of all pictures and of the pictures of each class.

    Args:
        shares: of each part, with the sum 1. seed: settles ties.
    """
    generator = random.Random(seed)
    classes = len(labels[0]) if labels else 0
    desired = [share * len(labels) for share in shares]
    members = [{position for position, row in enumerate(labels) if row[place]} for place in range(classes)]
    wanted = [[share * len(rows) for share in shares] for rows in members]
    part = [-1] * len(labels)

    def put(position: int, place: int | None) -> None:
        keys = [(wanted[place][j] if place is not None else 0.0, desired[j]) for j in range(len(shares))]
        best = [j for j, key in enumerate(keys) if key == max(keys)]
        chosen = generator.choice(best)
        part[position] = chosen
        desired[chosen] -= 1.0
        for other in range(classes):
            if labels[position][other]:
                wanted[other][chosen] -= 1.0
                members[other].discard(position)

    while any(members):
        place = min(
            (place for place in range(classes) if members[place]), key=lambda place: (len(members[place]), place)
        )
        for position in sorted(members[place]):
            put(position, place)
    for position in range(len(labels)):
        if part[position] < 0:
            put(position, None)
    return part


def folds_of_pictures(labels: Sequence[Sequence[float]], keys: Sequence[str], folds: int, seed: int) -> list[int]:
    """The fold in which each picture is tested, from 0; equal pictures (of one key) are in the same fold.

    Raises:
        DataError: there is one picture only.
    """
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    count = min(folds, len(first))
    if count < 2:
        raise DataError("Cross-validation needs two different pictures. Add pictures, or measure on a held-out split.")
    parts = fold_of_each([labels[row] for row in first.values()], [1.0 / count] * count, seed)
    numbers = {part: number for number, part in enumerate(sorted(set(parts)))}  # of so few pictures one may be empty
    fold_of_key = {key: numbers[part] for key, part in zip(first, parts, strict=True)}
    return [fold_of_key[key] for key in keys]


def few_shot_rows(
    labels: Sequence[Any], shots: int, seed: int, class_names: Sequence[str] | None, on_short: str
) -> list[int]:
    """`draw_shots` of the rows that have labels, after saying which classes are short; see `few_shot_indices`.

    Raises:
        FewShotError: `on_short="raise"` and a class is short.
    """
    rows = [row for row, label in enumerate(labels) if label is not None]
    known = [labels[row] for row in rows]
    counts = positives(known, len(known[0]) if known else 0)
    names = class_names or [str(place) for place in range(len(counts))]
    short = [f"{names[place]} ({count})" for place, count in enumerate(counts) if 0 < count < shots]
    if short and on_short != "ignore":
        message = (
            f"{len(short)} of {len(counts)} classes have fewer than {shots} training pictures: {', '.join(short[:10])}"
        )
        if on_short == "raise":
            raise FewShotError(f"{message}. Add pictures, ask for fewer shots, or allow it with on_short='warn'.")
        warnings.warn(f"{message}. All they have is taken.", stacklevel=3)
    return [rows[place] for place in draw_shots(known, shots, seed)]


def set_aside_share(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The pictures to train on and a random share of each class to measure on."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise DataError(f"holdout= is a share of the training pictures between 0 and 1, such as 0.2; got {share!r}.")
    if hasattr(images, "set_aside"):  # of several labels each
        return images.set_aside(share, seed)  # type: ignore[no-any-return]
    members: dict[int, list[int]] = {}
    for row, label in enumerate(images.labels):
        members.setdefault(label, []).append(row)
    alone = [images.class_names[label] for label, rows in members.items() if len(rows) < 2]
    if alone:
        raise DataError(
            f"{len(alone)} classes have one {images.noun} only, so none can be held out: {shorten(alone)}. Add "
            f"{images.noun}s, or leave holdout out: without held-out {images.noun}s the trainer measures by "
            "cross-validation."
        )
    generator = random.Random(seed)
    chosen: set[int] = set()
    for label in sorted(members):
        count = min(max(round(share * len(members[label])), 1), len(members[label]) - 1)
        chosen.update(generator.sample(members[label], count))
    train = images.select([row for row in range(len(images)) if row not in chosen])
    held_out = images.select(sorted(chosen))
    held_out.split = "holdout"
    return train, held_out
