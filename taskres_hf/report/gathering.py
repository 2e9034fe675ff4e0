"""What a report is made from: a classifier's answers to pictures that it was not trained on.

Held-out pictures are classified by the classifier itself, training pictures by cross-validation; pictures it was
trained on are told by their content, as `TaskResTrainer.evaluate` does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..artifact import RESIDUAL, find_artifact, read_checked
from ..data import LabelledImages, TrainingData, load_evaluation_data
from ..errors import BaseModelError, DataError, HubError, ImageError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..training import TaskResTrainer, TaskResTrainingArguments, recorded_arguments
from ..training.measuring import both_logits, cross_validated_metrics, full_metrics, known_digests, picture_names

_UNNAMED = "pictures"  # a split without a name
# Of the settings of training, those that say how pictures are read and embedded.
_READING = (
    "on_error", "engine", "precision", "crop", "exact_preprocessing", "draft_decoding", "embed_batch_size",
    "cache_dir", "use_cpu", "disable_tqdm", "image_column", "label_column", "label_map", "drop_unlabelled",
)  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """N labelled pictures of one split, with labels in the order of the model's classes.

    Attributes:
        split: its name. images: the pictures. root: the folder that file names are told from, or None.
        digests: SHA-256 of each picture's content; None where it cannot be read.
    """

    split: str
    images: LabelledImages
    root: Path | None = None
    digests: Sequence[str | None] = ()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, position: int) -> str:
        """What to call a picture: its file below `root`, or the file alone, else its row."""
        name = picture_names(self.images)(position)
        if "/" not in name and "\\" not in name:
            return name
        path = Path(name)
        if self.root is not None:
            try:
                return path.absolute().relative_to(self.root).as_posix()
            except ValueError:
                pass
        return path.name


@dataclass(frozen=True)
class Measured:
    """Answers to N pictures, none of them given by a classifier that was trained on that picture.

    Attributes:
        logits, zero_shot: [N, K] of the trained and of the zero-shot classifier. labels: [N] class ids.
        class_names: K names. metrics: as of `TaskResTrainer.evaluate` or `cross_validate`.
        pictures, places: the pictures, and where in them each of the N lies; None and empty where only embeddings were
            given.
        image_embeds: of the pictures [N, D], or None.
    """

    logits: Tensor
    zero_shot: Tensor
    labels: Tensor
    class_names: list[str]
    metrics: Mapping[str, Any]
    pictures: Pictures | None = None
    places: Sequence[int] = ()
    image_embeds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def confidence(self) -> list[float]:
        """The largest probability of each picture."""
        sure: list[float] = self.logits.double().softmax(dim=1).amax(dim=1).tolist()
        return sure

    @cached_property
    def predicted(self) -> Tensor:
        """The likeliest class id of each picture [N]."""
        return self.logits.argmax(dim=1)


@dataclass
class Evidence:
    """All that was looked at.

    Attributes:
        held_out, cross_validated: answers, or None where there are none.
        splits: every split that could be read. unreadable: split and name of pictures that cannot be read.
        notes: what a reader must know, one sentence each.
    """

    held_out: Measured | None = None
    cross_validated: Measured | None = None
    splits: list[Pictures] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Subject(NamedTuple):
    """Whom a report is about: what is recorded, and the model where its base could be loaded."""

    name: str
    config: Mapping[str, Any]
    model: TaskResCLIPForImageClassification | None
    lengths: list[float]  # of alpha times each row of the residual
    notes: list[str]

    @property
    def base(self) -> str:
        """The base model's Hub id; of a path of this machine the last part."""
        name = str(self.config.get("base_model_name_or_path") or "not recorded")
        return name if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def read_subject(model: Any, needed: bool, name: str | None, *, revision: str | None, **loading: Any) -> Subject:
    """Read what a report is about; without its base where pictures are not to be classified and it cannot be had."""
    if isinstance(model, TaskResCLIPForImageClassification):
        model.classifier.check_has_text("The report")
        config = model.config.to_dict()
        lengths = (model.classifier.alpha * model.classifier.residual.detach().norm(dim=1)).tolist()
        return Subject(name or "path/or/repo", config, model, lengths, [])
    where = os.fspath(model)
    config, tensors, _ = read_checked(*find_artifact(where, revision))
    values, (rows, dim) = tensors[RESIDUAL].values(), tensors[RESIDUAL].shape
    assert values is not None
    lengths = [
        abs(config["alpha"]) * sum(value * value for value in values[row * dim : (row + 1) * dim]) ** 0.5
        for row in range(rows)
    ]
    loaded, notes = None, []
    try:
        loaded = TaskResCLIPForImageClassification.from_pretrained(where, revision=revision, **loading)
        config = loaded.config.to_dict()
        loaded.classifier.check_has_text("The report")
    except (HubError, BaseModelError, OSError) as error:
        if needed:
            raise
        notes.append(f"The base model could not be loaded, so directions of the residual are not shown: {error}")
    shown = name or (Path(where).name if os.path.isabs(where) else where)
    return Subject(shown, config, loaded, lengths, notes)


def gather(
    model: TaskResCLIPForImageClassification,
    dataset: Any,
    args: TaskResTrainingArguments | None = None,
    *,
    split: str | None = None,
    folds: int = 5,
    **data_options: Any,
) -> Evidence:
    """Classify the held-out pictures, and the training pictures by cross-validation.

    Args:
        model: the classifier; it is not changed.
        dataset: as for `load_evaluation_data`, or what `load_training_data` gave.
        args: how to read and embed pictures; what it says of training does not count, that is as recorded. By default
            unreadable pictures are listed.
        split: the split to measure on; by default test, else validation, else the only one.
        folds: of the cross-validation; 0 for none.
        **data_options: `config_name`, `image_column` and so on, of `load_evaluation_data`.

    Raises:
        DataError: the dataset cannot be read, or has other classes than the model.
    """
    given = args or TaskResTrainingArguments(on_error="skip", disable_tqdm=True)
    reading = {option: getattr(given, option) for option in _READING}
    args = recorded_arguments(model.config.to_dict(), **reading, on_short="ignore")
    found = Evidence()
    held = _read_splits(found, model, dataset, args, split, data_options)
    known = {pictures.split: _known(pictures, model) for pictures in found.splits}
    trained = _training_split(found.splits, known, (model.config.data or {}).get("split"))
    trainer = TaskResTrainer(model, args)
    if held is not None:
        found.held_out = _measure(found, trainer, held, known[held.split])
    if trained is not None and folds and not model.classifier.is_zero_shot:
        found.cross_validated = _cross_validate(found, model, args, trained, known[trained.split][0], folds)
    if found.held_out is None and found.cross_validated is None:
        found.notes.append("Nothing could be measured on these pictures.")
    return found


# ---------------------------------------------------------------------- reading


def _read_splits(
    found: Evidence,
    model: TaskResCLIPForImageClassification,
    dataset: Any,
    args: TaskResTrainingArguments,
    split: str | None,
    options: Mapping[str, Any],
) -> Pictures | None:
    """Read every split into `found.splits`; the one to measure on, or None."""
    root = _root(dataset)

    def add(images: LabelledImages, name: str) -> Pictures:
        pictures = _with_digests(images.aligned(model.class_names, args.label_map), name, root, found)
        found.splits.append(pictures)
        return pictures

    if isinstance(dataset, TrainingData):
        add(dataset.train, dataset.train.split or "train")
        rest = dataset.held_out
        return None if rest is None else add(rest, rest.split or "held-out")
    if isinstance(dataset, LabelledImages):
        return add(dataset, dataset.split or _UNNAMED)
    options = {"default_names": model.class_names, "drop_unlabelled": args.drop_unlabelled, **options}
    chosen = load_evaluation_data(dataset, split, **options)
    held = add(chosen, chosen.split or _UNNAMED)
    for other in chosen.account.splits if chosen.account else ():
        if other.name != chosen.split:
            try:
                add(load_evaluation_data(dataset, other.name, **options), other.name)
            except DataError as error:
                found.notes.append(f"The split {other.name} was not looked at: {error}")
    return held


def _root(dataset: Any) -> Path | None:
    """The folder that a dataset lies in."""
    if not isinstance(dataset, (str, os.PathLike)) or not os.path.exists(dataset):
        return None
    path = Path(dataset).absolute()
    return path if path.is_dir() else path.parent


def _with_digests(images: LabelledImages, split: str, root: Path | None, found: Evidence) -> Pictures:
    digests: list[str | None] = []
    for position in range(len(images)):
        try:
            digests.append(images.digest(position))
        except ImageError:
            digests.append(None)
    pictures = Pictures(split, images, root, digests)
    found.unreadable += [(split, pictures.name(place)) for place, digest in enumerate(digests) if digest is None]
    return pictures


def _known(pictures: Pictures, model: TaskResCLIPForImageClassification) -> tuple[list[int], bool]:
    """Positions of pictures that the classifier was trained on, and whether those are all."""
    readable = [(place, digest) for place, digest in enumerate(pictures.digests) if digest is not None]
    rows, complete = known_digests([digest for _, digest in readable], model.config.data)
    return [readable[row][0] for row in rows], complete


def _training_split(
    splits: Sequence[Pictures], known: Mapping[str, tuple[list[int], bool]], recorded: str | None
) -> Pictures | None:
    """The split with the most pictures that were trained on, the recorded one where that is not clear."""
    best = max(splits, key=lambda pictures: (len(known[pictures.split][0]), pictures.split == recorded), default=None)
    return best if best is not None and known[best.split][0] else None


# ---------------------------------------------------------------------- measuring


def _measure(
    found: Evidence, trainer: TaskResTrainer, pictures: Pictures, known: tuple[list[int], bool]
) -> Measured | None:
    """The answers to the pictures of a split that the classifier was not trained on."""
    model = trainer.model
    trained_on, complete = set(known[0]), known[1]
    if not model.classifier.is_zero_shot:
        if trained_on and not complete:
            found.notes.append(
                f"Of the pictures in {pictures.split}, not all that were trained on can be told apart: so many were "
                "used that the classifier does not name each. Nothing was measured on this split."
            )
            return None
        if trained_on and len(trained_on) >= len(pictures) - pictures.digests.count(None):
            return None  # cross-validation takes its place
        if not (model.config.data or {}).get("train_pictures"):
            found.notes.append(
                "The classifier does not say which pictures it was trained on, so none could be left out: if some of "
                "those measured here are among them, the accuracy says too much."
            )
    else:
        trained_on = set()
    data = trainer.embed(pictures.images)
    places = _readable(found, pictures, data.skipped)
    rows = [row for row, place in enumerate(places) if place not in trained_on]
    if not rows:
        return None
    if len(rows) < len(places):
        found.notes.append(
            f"{len(places) - len(rows)} of {len(places)} pictures in {pictures.split} were trained on and are left out."
        )
        data = data.select(rows)
    logits, zero_shot = both_logits(model.classifier, data)
    chose = (model.config.data or {}).get("epoch_chosen_on") == data.digest
    metrics = full_metrics(logits, zero_shot, data.labels, model.class_names, None)
    metrics |= {"method": "validation" if chose else "held-out", "split": pictures.split}
    if model.classifier.strength != 1.0:
        metrics["strength"] = model.classifier.strength
    return Measured(
        logits, zero_shot, data.labels, model.class_names, metrics, pictures, [places[row] for row in rows],
        data.image_embeds[0],
    )  # fmt: skip


def _readable(found: Evidence, pictures: Pictures, skipped: Sequence[int]) -> list[int]:
    """Positions of the pictures that could be embedded; the others are told."""
    lost = set(skipped)
    found.unreadable += [
        (pictures.split, pictures.name(place)) for place in sorted(lost) if pictures.digests[place] is not None
    ]
    return [place for place in range(len(pictures)) if place not in lost]


def _cross_validate(
    found: Evidence,
    model: TaskResCLIPForImageClassification,
    args: TaskResTrainingArguments,
    pictures: Pictures,
    rows: list[int],
    folds: int,
) -> Measured | None:
    """The answers to the training pictures, each by a classifier that was trained without it."""
    training = model.config.training or {}
    if not training.get("recipe"):
        how = f"by the method {training['method']}" if training.get("method") else "by nothing that is recorded"
        found.notes.append(
            f"The classifier was trained {how}, which this report cannot repeat: no cross-validation on its pictures."
        )
        return None
    added = any(row.get("change") == "added" for row in training.get("changes") or ())
    if training.get("continued_from") or added:
        why = "Classes were added after it was trained" if added else "The classifier went on from another"
        found.notes.append(f"{why}, which cross-validation cannot repeat: none on its training pictures.")
        return None
    rows = _as_drawn(pictures, rows, model.config.few_shot)
    expected = int(((model.config.data or {}).get("train_pictures") or {}).get("count", 0))
    there = len({pictures.digests[row] for row in rows})
    if there < expected:
        found.notes.append(f"{expected - there} of the {expected} pictures it was trained on are not among these.")
    part = pictures.images.select(rows)
    try:
        data, outcome = TaskResTrainer(model, args, part).cross_validated_logits(folds)
        metrics = cross_validated_metrics(outcome, data) | {"method": "cross-validation", "split": pictures.split}
    except DataError as error:
        found.notes.append(f"No cross-validation: {error}")
        return None
    place_of = {(pictures.digests[row], pictures.images.labels[row]): row for row in reversed(rows)}
    embedded, named = set(data.digests), set(found.unreadable)
    lost = [(pictures.split, pictures.name(row)) for row in rows if pictures.digests[row] not in embedded]
    found.unreadable += [entry for entry in lost if entry not in named]
    labels = data.labels[torch.tensor(outcome.rows)]
    tested = zip(outcome.rows, labels.tolist(), strict=True)  # a picture may be there under two labels
    places = [place_of[data.digests[row], label] for row, label in tested]
    embeds = data.image_embeds[0][torch.tensor(outcome.rows)]
    return Measured(outcome.logits, outcome.zero_shot, labels, model.class_names, metrics, pictures, places, embeds)


def _as_drawn(pictures: Pictures, rows: list[int], few_shot: Mapping[str, Any] | None) -> list[int]:
    """The same pictures in the order of the draw, where it is of this dataset: folds depend on it."""
    place = {row: position for position, row in enumerate(pictures.images.indices)}
    drawn = [place.get(row, -1) for row in (few_shot or {}).get("indices") or ()]
    return drawn if drawn and set(drawn) <= set(rows) else rows
