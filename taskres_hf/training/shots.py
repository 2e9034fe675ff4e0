"""From any dataset to embeddings for a model's classes, and from a training set to the pictures of a run.

A training set loses what is not drawn, what cannot be read, and pictures under two labels.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data import LabelledImages, LabelledTexts, MultiLabelImages, class_counts
from ..embedding import Embedder, ImageFeatures, StoredFeatures, TextEmbedder, crop_size, embed_images
from ..errors import ConfigurationError, DataError, FewShotError
from ..few_shot import few_shot_indices
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..storage import cache_root
from .arguments import TaskResTrainingArguments
from .measuring import Name, picture_names, warn_of_conflicts
from .recipes import MOST_LOGITS

MOST_NUMBERS = 64_000_000  # of embeddings, 256 MB in fp32, that recipe `auto` reads from disk


class DatasetEmbeddings:
    """Embeddings of datasets, each made once.

    Args:
        model: whose base, image processor and classes are used. args: how. accelerator: shares pictures out.
    """

    def __init__(self, model: TaskResCLIPForImageClassification, args: TaskResTrainingArguments, accelerator: Any):
        self.model, self.args, self.accelerator = model, args, accelerator
        if model.config.text_encoding is not None:
            _refuse_for_texts(args)
        self._embedder: Embedder | TextEmbedder | None = None
        self._made: dict[tuple[int, int], tuple[Any, Any, ImageFeatures, str | None]] = {}

    @property
    def embedder(self) -> Embedder | TextEmbedder:
        """Base, processor and engine; made when first needed."""
        if self._embedder is None and self.model.config.text_encoding is not None:
            text_model: Any = self.model
            self._embedder = TextEmbedder(text_model.clip, text_model.tokenizer, text_model.encoding)
        if isinstance(self._embedder, Embedder) and self._embedder.image_processor is not self.model.image_processor:
            self._embedder = None
        if self._embedder is None:
            args, engine, precision = self.args, self.args.engine, self.args.precision
            if args.recipe == "paper":  # as published unless asked otherwise
                engine = "torch" if engine == "auto" else engine
                precision = "fp32" if precision == "auto" else precision
            crop: dict[str, Any] = {"crop": args.crop} if args.crop != "processor" else {}
            self._embedder = Embedder(
                self.model.clip, self.model.image_processor, engine, precision, args.exact_preprocessing,
                args.draft_decoding, **crop,
            )  # fmt: skip
        return self._embedder

    def source(self, dataset: Any) -> LabelledImages | ImageFeatures | StoredFeatures:
        """A dataset with labels in the order of the model's classes.

        Raises:
            DataError: embeddings of another length or other classes; or as `LabelledImages`.
        """
        names, dim = self.model.class_names, self.model.classifier.base.shape[1]
        if isinstance(dataset, (ImageFeatures, StoredFeatures)):
            length = dataset.shape[2] if isinstance(dataset, StoredFeatures) else dataset.image_embeds.shape[2]
            if dataset.class_names != names or length != dim:
                raise DataError(
                    f"The embeddings have {len(dataset.class_names)} classes and length {length}; the model has "
                    f"{len(names)} and {dim}, or names or order differ."
                )
            self.model.classifier.check_labels(several=isinstance(dataset, ImageFeatures) and dataset.labels.ndim == 2)
            return dataset
        texts = self.model.config.text_encoding is not None
        if isinstance(dataset, LabelledImages) and isinstance(dataset, LabelledTexts) != texts:
            kinds = ("texts", "pictures") if texts else ("pictures", "texts")
            raise DataError(f"The model is a classifier of {kinds[0]}, and the data set holds {kinds[1]}.")
        if not isinstance(dataset, LabelledImages):
            several: Any = MultiLabelImages if self.model.classifier.several_labels else LabelledImages
            column = {"image_column": self.args.image_column}
            if texts:
                several, column = LabelledTexts, {"text_column": self.args.text_column}
            dataset = several(
                dataset,
                **column,
                label_column=self.args.label_column,
                default_names=names,
                drop_unlabelled=self.args.drop_unlabelled,
            )
        self.model.classifier.check_labels(several=isinstance(dataset, MultiLabelImages))
        aligned: LabelledImages = dataset.aligned(names, self.args.label_map)
        return aligned

    def of(self, dataset: Any, views: int = 0) -> ImageFeatures:
        """Embeddings of a dataset, made once for the same classes and image processor; see `TaskResTrainer.embed`."""
        made = self._made.get((id(dataset), views))
        # The dataset is kept beside its embeddings, or its id could come back as another's.
        if made is None or made[2].class_names != self.model.class_names or made[3] != self._prepared_by():
            source = self.source(dataset)
            if isinstance(source, StoredFeatures):
                raise DataError("Embeddings on disk are for training; measure on ImageFeatures or pictures.")
            data = source if isinstance(source, ImageFeatures) else self.of_pictures(source, views)
            made = self._made[id(dataset), views] = (dataset, source, data, self._prepared_by())
        return made[2]

    def _prepared_by(self) -> str | None:
        """What the image processor says now; None before a picture was embedded, and of texts."""
        return self.model.image_processor.to_json_string() if isinstance(self._embedder, Embedder) else None

    def names(self, dataset: Any) -> Name:
        """What to call the pictures of a dataset, by their positions in its embeddings."""
        data = self.of(dataset)
        source = self._made[id(dataset), 0][1]
        if isinstance(source, ImageFeatures):
            return picture_names(None)
        lost = set(data.skipped)
        return picture_names(source.select([row for row in range(len(source)) if row not in lost]) if lost else source)

    def of_pictures(self, images: LabelledImages, views: int) -> ImageFeatures:
        """Embeddings of pictures; see `embed_images`."""
        cache_dir: Any = self.args.cache_dir
        if cache_dir is None or cache_dir is True:
            cache_dir = cache_root() / "features"
        return embed_images(
            self.embedder,
            images,
            views=views,
            seed=self.args.seed,
            batch_size=self.args.embed_batch_size,
            cache_dir=cache_dir or None,
            on_error=self.args.on_error,
            progress=not self.args.disable_tqdm,
            accelerator=self.accelerator,
        )


_FOR_PICTURES = {
    "views": 0, "augment_online": None, "exact_preprocessing": False, "draft_decoding": False, "crop": "processor",
}  # fmt: skip


def _refuse_for_texts(args: TaskResTrainingArguments) -> None:
    """Refuse settings that are for pictures.

    Raises:
        ConfigurationError: names them.
    """
    given = [name for name, default in _FOR_PICTURES.items() if getattr(args, name) not in (default, False)]
    given += [name for name, known in (("engine", "torch"), ("precision", "fp32"))
              if getattr(args, name) not in ("auto", known)]  # fmt: skip
    if given:
        raise ConfigurationError(f"{', '.join(given)}: for pictures, and the classifier is of texts. Leave it out.")


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
    check_classes(labels, class_names, args.on_short, noun=getattr(source, "noun", "picture"))
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
    online = not isinstance(source, LabelledTexts) and _augments_online(args, image_processor)
    data, rows, replaced = _embed_readable(source, rows, args, embed)
    check_classes(data.labels.tolist(), class_names, args.on_short, "that can be read", source.noun)
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


def check_classes(
    labels: Sequence[Any], class_names: Sequence[str], on_short: str, which: str = "", noun: str = "picture"
) -> None:
    """Refuse a class without any picture, unless `on_short="ignore"`; name one that is on all of several labels.

    Raises:
        FewShotError: names the classes.
    """
    absent = [name for name, count in class_counts(labels, class_names).items() if count == 0]
    if absent and on_short != "ignore":
        kind = f"training {noun} {which}".strip()
        raise FewShotError(
            f"{len(absent)} of {len(class_names)} classes have no {kind}: {absent[:5]}. Add at least one each, "
            "leave the classes out of the model, or accept it with on_short='ignore'."
        )
    if on_short != "ignore" and labels and isinstance(labels[0], (tuple, list)):
        counts = class_counts(labels, class_names)
        always = [name for name, count in counts.items() if count == len(labels)]
        if always:
            warnings.warn(
                f"{len(always)} classes are on every training picture, which tells nothing of when they are not: "
                f"{always[:5]}. Add pictures without them.",
                stacklevel=4,
            )


def at_once(chosen: TrainingPictures) -> TrainingPictures:
    """The same with embeddings on disk read into memory, for recipe `auto`: all, or as many a class as it may hold.

    Which ones is decided by the labels alone. A warning says so where not all are taken.
    """
    stored = chosen.data
    if not isinstance(stored, StoredFeatures):
        return chosen
    count, dim = stored.shape[1:]
    classes = len(stored.class_names)
    most = min(MOST_NUMBERS // dim, MOST_LOGITS // classes)
    rows = torch.arange(count) if count <= most else stored.spread(most)
    data = ImageFeatures(stored.read(rows)[None], stored.labels[rows], stored.class_names, stored.digest)
    if len(rows) == count:
        return replace(chosen, data=data)
    each = int(torch.bincount(data.labels).max())
    warnings.warn(
        f"{count:,} embeddings on disk times {classes:,} classes are more than recipe auto fits at once: it takes up "
        f"to {each:,} of a class, spread over the file. recipe='auto-v1' trains on all of them, by epochs.",
        stacklevel=4,
    )
    digest = hashlib.sha256(f"{stored.digest} {each}".encode()).hexdigest()
    return replace(
        chosen, data=replace(data, digest=digest), few_shot={**chosen.few_shot, "num_images": len(rows), "of": count}
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
    warnings.warn(
        f"{replaced} drawn {source.noun}s cannot be read; others of their classes take their place.", stacklevel=5
    )
    return embed(source.select(rows), args.views), rows, replaced


def _unreadable(images: LabelledImages, views: int, embed: Embed) -> set[int]:
    try:
        return set(embed(images, views).skipped)
    except DataError:  # none of them can be read
        return set(range(len(images)))
