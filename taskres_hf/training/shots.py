"""From a training set to the pictures of a run: the draw, pictures that cannot be read, pictures under two labels."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.labelled import LabelledImages, class_counts
from ..embedding.augmentation import crop_size
from ..embedding.features import ImageFeatures
from ..embedding.stored import StoredFeatures
from ..errors import ConfigurationError, DataError, FewShotError
from ..few_shot import few_shot_indices
from .arguments import TaskResTrainingArguments
from .known_pictures import picture_names, warn_of_conflicts

Embed = Callable[[LabelledImages, int], ImageFeatures]


@dataclass(frozen=True)
class TrainingPictures:
    """What a run learns from.

    Attributes:
        data: N embeddings with labels, in the order of `images`.
        images: the N pictures, or None where embeddings were given.
        online: whether pictures are augmented afresh every epoch.
        few_shot: the draw, for the config.
        conflicting: number of pictures that are there under several labels.
    """

    data: ImageFeatures | StoredFeatures
    images: LabelledImages | None
    online: bool
    few_shot: dict[str, Any]
    conflicting: int = 0


def training_pictures(
    source: LabelledImages | ImageFeatures | StoredFeatures,
    args: TaskResTrainingArguments,
    class_names: Sequence[str],
    embed: Embed,
    image_processor: Callable[[], Any],
) -> TrainingPictures:
    """Draw, embed and check.

    Args:
        source: with labels in the order of `class_names`.
        embed: embeddings of pictures, with that many views.

    Raises:
        FewShotError: a class has no picture that can be read, or fewer than `shots` with `on_short="raise"`.
        ConfigurationError: settings that need pictures, where there are embeddings.
    """
    labels = source.labels if isinstance(source, LabelledImages) else source.labels.tolist()
    check_classes(labels, class_names, args.on_short)
    if isinstance(source, StoredFeatures):
        if args.shots is not None or args.augment_online or args.views:
            raise ConfigurationError(
                "Embeddings on disk are taken as they are: shots, views and augment_online do not apply."
            )
        few_shot = {"shots": None, "seed": args.seed, "num_images": len(source)}
        return TrainingPictures(source, None, False, few_shot)
    rows = _draw(labels, args, class_names)
    if isinstance(source, ImageFeatures):
        if args.augment_online:
            raise ConfigurationError("augment_online needs pictures; train_dataset holds embeddings.")
        data = source if len(rows) == len(source) else source.select(rows)
        return TrainingPictures(
            data, None, False, _few_shot(args, rows, len(rows)), warn_of_conflicts(data, picture_names(None))
        )
    online = _augments_online(args, image_processor)
    data, rows, replaced = _embed_readable(source, rows, args, embed)
    check_classes(data.labels.tolist(), class_names, args.on_short, "that can be read")
    if args.shots is not None and data.skipped and args.on_short == "raise":
        few_shot_indices(data.labels.tolist(), args.shots, args.seed, on_short="raise", class_names=class_names)
    lost = set(data.skipped)
    rows = [row for place, row in enumerate(rows) if place not in lost]
    images = source if len(rows) == len(source) else source.select(rows)
    few_shot = _few_shot(args, images.indices, len(rows))
    if lost:
        few_shot["unreadable"] = len(lost)
    if replaced:
        few_shot["replaced"] = replaced
    return TrainingPictures(data, images, online, few_shot, warn_of_conflicts(data, picture_names(images)))


def check_classes(labels: Sequence[int], class_names: Sequence[str], on_short: str, which: str = "") -> None:
    """Refuse a class without any picture, unless `on_short="ignore"`.

    Raises:
        FewShotError: names the classes.
    """
    absent = [name for name, count in class_counts(labels, class_names).items() if count == 0]
    if absent and on_short != "ignore":
        kind = f"training picture {which}".strip()
        raise FewShotError(
            f"{len(absent)} of {len(class_names)} classes have no {kind}: {absent[:5]}. Add at least one each, "
            "leave the classes out of the model, or accept it with on_short='ignore'."
        )


def _draw(labels: Sequence[int], args: TaskResTrainingArguments, class_names: Sequence[str]) -> list[int]:
    everything = list(range(len(labels)))
    if args.shots is None:
        return everything
    rows = few_shot_indices(labels, args.shots, args.seed, on_short=args.on_short, class_names=class_names)
    # All there are, in their own order: the same run as without shots.
    return everything if len(rows) == len(labels) else rows


def _few_shot(args: TaskResTrainingArguments, rows: Sequence[int], count: int) -> dict[str, Any]:
    drawn: dict[str, Any] = {"shots": args.shots, "seed": args.seed, "num_images": count}
    return drawn if args.shots is None else {**drawn, "indices": list(rows)}


def _augments_online(args: TaskResTrainingArguments, image_processor: Callable[[], Any]) -> bool:
    """Recipe `paper` augments afresh each epoch unless views are cached or the user says otherwise."""
    online = args.augment_online
    if online is None:
        online = args.recipe == "paper" and not args.views
    if online:
        try:
            crop_size(image_processor())
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} Pictures cannot be augmented then: set augment_online=False.") from error
    return online


def _embed_readable(
    source: LabelledImages, rows: list[int], args: TaskResTrainingArguments, embed: Embed
) -> tuple[ImageFeatures, list[int], int]:
    """Embeddings of the drawn rows; drawn pictures that cannot be read are replaced by others of their class.

    Returns:
        Embeddings, the rows they are of (also of those left out as unreadable), and how many were replaced.
    """
    part = source if len(rows) == len(source) else source.select(rows)
    data = embed(part, args.views)
    if args.shots is None or not data.skipped:
        return data, rows, 0
    drawn = set(rows)
    rest: dict[int, list[int]] = {}
    for row, label in enumerate(source.labels):
        if row not in drawn:
            rest.setdefault(label, []).append(row)
    generator = random.Random(f"{args.seed} replacements")
    for others in rest.values():
        generator.shuffle(others)
    rows, replaced = list(rows), 0
    unread = list(data.skipped)
    while places := [place for place in unread if rest.get(source.labels[rows[place]])]:
        for place in places:
            rows[place] = rest[source.labels[rows[place]]].pop()
        broken = _unreadable(source.select([rows[place] for place in places]), args.views, embed)
        unread = [place for number, place in enumerate(places) if number in broken]
        replaced += len(places) - len(unread)
    if not replaced:
        return data, rows, 0
    warnings.warn(f"{replaced} drawn pictures cannot be read; others of their classes take their place.", stacklevel=5)
    return embed(source.select(rows), args.views), rows, replaced


def _unreadable(images: LabelledImages, views: int, embed: Embed) -> set[int]:
    try:
        return set(embed(images, views).skipped)
    except DataError:  # none of them can be read
        return set(range(len(images)))
