"""What one person does in the app, without a browser: classes, pictures, labels, embeddings, classifier, artifact.

A picture is read once: its embedding [D] and a small preview stay in memory, its file is not needed again.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from ..data import finder, load_training_data
from ..embedding import ImageFeatures
from ..errors import ConfigurationError, DataError, HubError, ImageError
from ..storage import write_bytes
from ..training import TaskResTrainer, TaskResTrainingArguments
from ..training.measuring import fold_of_each_picture
from .looking import Backbone, Model, Progress, Source, read_pictures, silent

FOLDS = 5


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        key: SHA-256 of its content. name: of its file. label: class name. embeds: [D] fp32.
        preview: a small JPEG as a data: address.
    """

    key: str
    name: str
    label: str
    embeds: Tensor
    preview: str


@dataclass(frozen=True)
class Added:
    """What became of the pictures handed over: how many are new, how many were there, and what to know, a line each."""

    new: int = 0
    repeated: int = 0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Guess:
    """A picture with the class that a classifier gives it, and the probability, from 0 to 1."""

    picture: Picture
    label: str
    score: float

    @property
    def is_right(self) -> bool:
        """Whether it is the picture's own class."""
        return self.label == self.picture.label


@dataclass(frozen=True)
class Answer:
    """What a new picture is taken for.

    Attributes:
        name, preview: as of `Picture`. error: why there is no answer, or None.
        classes: class names and probabilities, likeliest first. zero_shot: the likeliest without training.
        known: whether it is one of the pictures of this session.
    """

    name: str
    preview: str = ""
    classes: tuple[tuple[str, float], ...] = ()
    zero_shot: tuple[str, float] | None = None
    known: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """A training: the metrics of `TaskResTrainer.measure` (empty where nothing could be measured), and notes."""

    metrics: dict[str, Any]
    notes: tuple[str, ...] = ()


class Session:
    """One person's work. Nothing of it is shared with another session but the frozen base.

    Args:
        backbone: see `Backbone`. folder: an empty folder of its own, removed by `close`.
        model: a trained classifier to begin with.

    Attributes:
        class_names, templates: as in `from_base`. pictures: key to picture, in the order they came.
        outcome: of the last training; None before the first. is_trained: whether the classifier is more than zero-shot.
        is_stale: whether pictures or labels changed since. lock: for whoever calls from several threads.
    """

    def __init__(self, backbone: Backbone, folder: str | os.PathLike[str], model: Model | None = None) -> None:
        self.backbone, self.folder = backbone, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.class_names: list[str] = []
        self.templates: list[str] = []
        self.pictures: dict[str, Picture] = {}
        self.outcome: Outcome | None = None
        self.is_stale, self.is_trained = False, model is not None
        self._prompting: dict[str, Any] = {}
        self._held_out: list[Guess] = []
        self._model = model
        if model is not None:
            config = model.config
            self.class_names, self.templates = list(config.class_names), list(config.templates)
            names = ("class_descriptions", "prompt_names", "underscores", "prompt_average")
            self._prompting = {name: getattr(config, name) for name in names}

    # ------------------------------------------------------------------ classes

    def set_classes(self, names: str | Sequence[str], template: str | Sequence[str] | None = None) -> list[str]:
        """Name the classes, or name them anew; a trained classifier is dropped where that changes anything.

        Where as many names as before are given, one that takes the place of another renames it, pictures and all.

        Args:
            names: one a line or separated by commas, or a list. template: a sentence with `{}`; as before when None.

        Returns:
            Notes, a line each.

        Raises:
            ClassNamesError, ConfigurationError: fewer than two, twice the same, no `{}`.
            DataError: a class that has pictures would be gone.
        """
        if isinstance(names, str):
            names = [name.strip() for line in names.splitlines() for name in line.split(",") if name.strip()]
        with self._noting() as notes:
            if self._model is not None and list(names) == self.class_names and template in (None, *self.templates[:1]):
                return notes
            same = self._prompting if list(names) == self.class_names else {}
            model = self.backbone.classifier(names, templates=template or self.templates or None, **same)
        found = list(model.config.class_names)
        renamed = _renamed(self.class_names, found)
        counts = Counter(renamed.get(picture.label, picture.label) for picture in self.pictures.values())
        lost = [f"{name} ({count})" for name, count in counts.items() if name not in found]
        if lost:
            raise DataError(
                f"Classes with pictures would be gone: {', '.join(lost)}. Move or remove their pictures first, or keep "
                "the names."
            )
        self._use(model, same)
        self.class_names, self.templates = found, list(model.config.templates)
        for key, picture in self.pictures.items():
            self.pictures[key] = replace(picture, label=renamed.get(picture.label, picture.label))
        return notes

    def _use(self, model: Model, prompting: dict[str, Any]) -> None:
        self._model, self._prompting = model, prompting
        self.outcome, self._held_out, self.is_trained, self.is_stale = None, [], False, False

    @property
    def model(self) -> Model:
        """The classifier; zero-shot until it is trained.

        Raises:
            ConfigurationError: there are no classes yet.
        """
        if self._model is None:
            raise ConfigurationError("Name the classes first: at least two, one a line.")
        return self._model

    # ------------------------------------------------------------------ pictures

    def add_files(self, files: Iterable[str | os.PathLike[str]], label: str, progress: Progress = silent) -> Added:
        """Add picture files to a class.

        Raises:
            DataError: there is no such class.
        """
        self._check_label(label)
        sources = [Source(str(file), Path(file).name, label) for file in files]
        return self._add(sources, progress)

    def add_tree(self, source: str | os.PathLike[str], progress: Progress = silent) -> Added:
        """Add a folder or an archive with a folder for each class; folders of new names make new classes.

        Read by `load_training_data`, so it means the same as for `taskres train`, without its held-out split.

        Raises:
            DataError: no class folders, a damaged archive, or more than one way to read it.
        """
        with self._noting() as notes:
            data = load_training_data(source, eval_split="none")
        images = data.train
        find = finder(self.class_names)
        known = [find(name) for name in images.class_names]
        names = [
            name if place is None else self.class_names[place]
            for name, place in zip(images.class_names, known, strict=True)
        ]
        fresh = [name for name, place in zip(images.class_names, known, strict=True) if place is None]
        if fresh:
            notes += self.set_classes([*self.class_names, *fresh])
        added = self._add([Source.of_row(images, row, names) for row in range(len(images))], progress)
        lines = [line.strip() for line in data.account.lines()[1:]]
        return replace(added, notes=(*lines, *notes, *added.notes))

    def add_folder(self, files: Iterable[tuple[str, str]], progress: Progress = silent) -> Added:
        """Add a folder that came file by file.

        Args:
            files: path of each file, and where it lies in the folder, such as `("/tmp/x", "photos/cat/1.jpg")`.

        Raises:
            DataError: a place outside the folder; or as `add_tree`.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            for file, name in files:
                parts = PurePosixPath(name.replace("\\", "/")).parts
                if not parts or name.startswith("/") or ".." in parts or ":" in parts[0] or "\0" in name:
                    raise DataError(f"{name!r} is not a place inside a folder.")
                target = Path(place, *parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            return self.add_tree(place, progress)

    def relabel(self, key: str, label: str) -> None:
        """Give a picture another class.

        Raises:
            DataError: no such picture or class.
        """
        self._check_label(label)
        picture = self._picture(key)
        if picture.label != label:
            self.pictures[key] = replace(picture, label=label)
            self._changed()

    def remove(self, key: str) -> None:
        """Leave a picture out.

        Raises:
            DataError: no such picture.
        """
        del self.pictures[self._picture(key).key]
        self._changed()

    def counts(self) -> dict[str, int]:
        """Number of pictures per class, in class order."""
        found = Counter(picture.label for picture in self.pictures.values())
        return {name: found[name] for name in self.class_names}

    def zero_shot(self) -> list[Guess]:
        """What the untrained classifier takes each picture for; it has not seen their labels."""
        return self._guesses(self.model.classifier.zero_shot_logits) if self.pictures else []

    def _guesses(self, logits_of: Callable[[Tensor], Tensor]) -> list[Guess]:
        pictures = list(self.pictures.values())
        with torch.no_grad():
            logits = logits_of(torch.stack([picture.embeds for picture in pictures]).to(self._device))
        return _as_guesses(pictures, logits.cpu(), self.class_names)

    def _add(self, sources: Sequence[Source], progress: Progress) -> Added:
        problems: list[str] = []
        fresh: dict[str, Source] = {}
        repeated = 0
        for source in sources:
            try:
                key = source.key()
            except ImageError as error:
                problems.append(str(error))
                continue
            there = self.pictures.get(key)
            if there is not None and there.label != source.label:
                problems.append(f"{source.name} is there already, as {there.label}: change its class there.")
            elif key in fresh and fresh[key].label != source.label:
                problems.append(f"{source.name} came twice: for {fresh[key].label} and for {source.label}.")
            elif there is not None or key in fresh:
                repeated += 1
            else:
                fresh[key] = source
        with self._noting() as notes:
            found = read_pictures(self.backbone, fresh, problems, progress)
        for key, (embeds, preview) in found.items():
            source = fresh[key]
            self.pictures[key] = Picture(key, source.name, source.label, embeds, preview)
        if found:
            self._changed()
        return Added(len(found), repeated, tuple(problems), tuple(notes))

    def _picture(self, key: str) -> Picture:
        if key not in self.pictures:
            raise DataError("That picture is gone: it was removed.")
        return self.pictures[key]

    def _check_label(self, label: str) -> None:
        if label not in self.class_names:
            raise DataError(f"There is no class {label!r}: choose one of {', '.join(self.class_names) or 'none yet'}.")

    def _changed(self) -> None:
        self.is_stale = self.is_trained

    @property
    def _device(self) -> torch.device:
        return self.model.classifier.residual.device

    # ------------------------------------------------------------------ training

    def train(self, progress: Progress = silent) -> Outcome:
        """Train on all pictures by recipe `auto`, measure by cross-validation, save; see `outcome` and `archive`.

        Raises:
            DataError: a class without any picture.
        """
        absent = [name for name, count in self.counts().items() if not count]
        if not self.pictures or absent:
            missing = f" ({', '.join(absent[:10])})" if self.pictures else ""
            raise DataError(f"Every class needs at least one picture, better five or more{missing}. Add some first.")
        progress(0.05, "Preparing")
        features, seen = self._features(), []

        def keep(prediction: EvalPrediction) -> dict[str, float]:
            seen.append(prediction)
            return {}

        arguments = TaskResTrainingArguments(output_dir=str(self.folder / "run"), disable_tqdm=True)
        with self._noting() as notes:
            model = self.backbone.classifier(self.class_names, templates=self.templates or None, **self._prompting)
            trainer = TaskResTrainer(model, arguments, features, compute_metrics=keep)
            progress(0.2, f"Training on {len(features)} pictures")
            trainer.train()
            progress(0.5, "Measuring on pictures that it was not trained on")
            metrics = trainer.measure(folds=FOLDS)
        progress(0.9, "Saving")
        self._use(model, self._prompting)
        if metrics:
            self._held_out = self._tested(features, seen[-1], arguments.seed)
        self._save()
        self.is_trained, self.outcome = True, Outcome(metrics, tuple(notes))
        progress(1.0, "Done")
        return self.outcome

    def _features(self) -> ImageFeatures:
        pictures, ids = list(self.pictures.values()), {name: place for place, name in enumerate(self.class_names)}
        labels = [ids[picture.label] for picture in pictures]
        digest = hashlib.sha256(repr([list(self.pictures), labels, self.class_names]).encode()).hexdigest()
        embeds = torch.stack([picture.embeds for picture in pictures])[None]
        return ImageFeatures(embeds, torch.tensor(labels), self.class_names, digest, (), tuple(self.pictures))

    def _tested(self, features: ImageFeatures, prediction: EvalPrediction, seed: int) -> list[Guess]:
        """What each picture was taken for by the classifier of the fold that it was no part of."""
        fold = fold_of_each_picture(features.labels.tolist(), features.digests, FOLDS, seed)
        rows = sorted((row for row in range(len(fold)) if fold[row] >= 0), key=lambda row: (fold[row], row))
        assert features.labels[rows].tolist() == list(prediction.label_ids)
        pictures = list(self.pictures.values())
        logits = torch.as_tensor(prediction.predictions)
        return _as_guesses([pictures[row] for row in rows], logits, self.class_names)

    def mistakes(self) -> list[Guess]:
        """Pictures whose label is not what cross-validation takes them for, the surest first.

        None of them was part of the training that judged it. A picture whose label was changed to that class since, or
        that was removed, is none any more.
        """
        kept = [guess for guess in self._held_out if guess.picture.key in self.pictures]
        now = [replace(guess, picture=self.pictures[guess.picture.key]) for guess in kept]
        return sorted((guess for guess in now if not guess.is_right), key=lambda guess: -guess.score)

    # ------------------------------------------------------------------ using

    def classify(self, files: Iterable[str | os.PathLike[str]], top_k: int = 5) -> list[Answer]:
        """What each picture file is taken for; a picture that cannot be read has an error instead."""
        model, answers = self.model, []
        for file in files:
            problems: list[str] = []
            source = Source(str(file), Path(file).name)
            try:
                key = source.key()
            except ImageError as error:
                answers.append(Answer(source.name, error=str(error)))
                continue
            there = self.pictures.get(key)
            with self._noting():
                found = (
                    {key: (there.embeds, there.preview)}
                    if there
                    else read_pictures(self.backbone, {key: source}, problems)
                )
            if not found:
                answers.append(Answer(source.name, error=problems[0]))
                continue
            embeds, preview = found[key]
            with torch.no_grad():
                row = embeds[None].to(self._device)
                trained = model.classifier(row)[0].softmax(0)
                before = model.classifier.zero_shot_logits(row)[0].softmax(0)
            scores, places = trained.cpu().topk(min(top_k, len(self.class_names)))
            classes = [(self.class_names[k], score) for k, score in zip(places.tolist(), scores.tolist(), strict=True)]
            best = int(before.argmax())
            guess = (self.class_names[best], float(before[best])) if self.is_trained else None
            answers.append(Answer(source.name, preview, tuple(classes), guess, there is not None))
        return answers

    # ------------------------------------------------------------------ keeping

    @property
    def artifact(self) -> Path:
        """Folder of the saved classifier.

        Raises:
            DataError: nothing was trained yet, or pictures or labels changed since.
        """
        folder = self.folder / "classifier"
        if self.outcome is None or self.is_stale:
            why = "Pictures or labels changed since it was trained" if self.is_stale else "Nothing was trained yet"
            raise DataError(f"{why}: train first, then take the classifier.")
        return folder

    @property
    def archive(self) -> Path:
        """The saved classifier as `classifier.zip`; raises as `artifact`."""
        return self.artifact.with_suffix(".zip")

    def push(self, repo_id: str, private: bool = True) -> str:
        """Upload the classifier with the login of this machine; where it is then.

        Raises:
            DataError: see `artifact`. ConfigurationError: no name. HubError: the Hub refuses or cannot be reached.
        """
        from ..hub import push_folder
        from ..report import figure_for_card

        if not repo_id.strip():
            raise ConfigurationError("Give the repository a name, such as me/pets-taskres.")
        folder = self.artifact
        try:
            with self._noting():
                figure = figure_for_card(folder)
                return str(push_folder(folder, repo_id.strip(), private=private or None, figure=figure).repo_url)
        except HubError as error:  # its advice names a folder that goes with this session
            why = str(error).partition(" The classifier is whole in ")[0]
            raise HubError(f"{why} The classifier is still here: download it, or try again.") from error

    def _save(self) -> None:
        folder, stream = self.folder / "classifier", io.BytesIO()
        shutil.rmtree(folder, ignore_errors=True)
        self.model.save_pretrained(folder)
        Model.from_pretrained(folder, base_model=self.backbone.base)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"classifier/{file.name}")
        write_bytes(folder.with_suffix(".zip"), stream.getvalue())

    def close(self) -> None:
        """Forget everything and remove the folder."""
        self.pictures.clear()
        self._held_out, self._model, self.outcome = [], None, None
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def _noting(self) -> Iterator[list[str]]:
        """What the library warns of meanwhile, a line each, for the page instead of the terminal."""
        notes: list[str] = []
        with self.backbone.lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                yield notes
            finally:
                notes += dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))


def _renamed(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Old name to new name of classes that another name took the place of."""
    if len(old) != len(new):
        return {}
    return {a: b for a, b in zip(old, new, strict=True) if a != b and a not in new and b not in old}


def _as_guesses(pictures: Sequence[Picture], logits: Tensor, names: Sequence[str]) -> list[Guess]:
    scores, places = logits.softmax(dim=1).max(dim=1)
    rows = zip(pictures, places.tolist(), scores.tolist(), strict=True)
    return [Guess(picture, names[place], score) for picture, place, score in rows]
