"""The runner: tasks x shots x seeds x recipes, each drawn, trained and measured once, with resume.

`few_shot_runs` is the loop itself, over embeddings; `run_benchmark` runs it on described datasets, with a file a run.
What is reported of the results stands in `paper.reports`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..artifact import library_versions
from ..data.labelled import LabelledImages
from ..embedding.features import ImageFeatures, content_digest
from ..errors import DataError
from ..evaluation import accuracy
from ..few_shot import few_shot_indices
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..storage import write_sealed
from ..training import TaskResTrainer, TaskResTrainingArguments
from ..training.recipes import published_epochs
from .cells import CHANGE_NOTHING, plain, read_cell, require_same_run, write_draw
from .datasets import PaperData, describe_dataset, open_dataset

PAPER_VIEWS = 10  # cached augmented views for recipe "paper"; the published code draws a fresh one every epoch


@dataclass(frozen=True)
class Cell:
    """One run: a dataset, a number of shots, a seed and a recipe."""

    dataset: str
    shots: int
    seed: int
    recipe: str

    @property
    def file_name(self) -> str:
        return f"{self.dataset}-{self.shots}shots-seed{self.seed}-{self.recipe}.json"


def grid(dataset: str, shots: Iterable[int], seeds: Sequence[int], recipes: Sequence[str] = ("auto",)) -> list[Cell]:
    """All runs of a dataset, in the order in which tables show them."""
    return [Cell(dataset, count, seed, recipe) for count in shots for recipe in recipes for seed in seeds]


# Test pictures, and the classes that compete on them (None: all).
Tests = Mapping[str, tuple[ImageFeatures, Sequence[int] | None]]


def few_shot_runs(
    model: TaskResCLIPForImageClassification,
    cells: Iterable[Cell],
    train: Callable[[Cell], ImageFeatures | LabelledImages],
    tests: Callable[[Cell], Tests],
    settings: Callable[[Cell], Mapping[str, Any]],
) -> Iterator[tuple[Cell, dict[str, tuple[float, float]]]]:
    """Train and measure one run after the other.

    Args:
        model: the classifier; each run starts at zero-shot and leaves its own residual in it.
        train: what a run is trained on: the pictures drawn for it, or their embeddings.
        tests: name to test pictures of a run. settings: of `TaskResTrainingArguments`, besides the seed.

    Yields:
        Each run with zero-shot and trained accuracy, from 0 to 1, on each of its tests.
    """
    for cell in cells:
        model.classifier.reset()
        options = {"seed": cell.seed, "on_short": "ignore", "disable_tqdm": True, **settings(cell)}
        TaskResTrainer(model, TaskResTrainingArguments(**options), train(cell)).train()
        yield cell, {name: accuracies(model, test, rows) for name, (test, rows) in tests(cell).items()}


def task_runs(
    model: TaskResCLIPForImageClassification,
    splits: Mapping[str, Any],
    name: str,
    shots: Sequence[int],
    seeds: Sequence[int],
    recipe: str = "auto",
    on_run: Callable[[], object] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """Every draw of a task that is open already, trained and measured on its test split.

    Only pictures that some draw needs are embedded, and those once; recipe `"paper"` embeds `PAPER_VIEWS` views of each
    draw.

    Args:
        model: a classifier for the classes of the task. splits: with `train` and `test`, columns as `LabelledImages`
            finds them. on_run: called after each run.

    Yields:
        Rows as `reports.summarise` takes them.
    """
    train, cells = LabelledImages(splits["train"]), grid(name, shots, seeds, [recipe])
    rows = {cell: few_shot_indices(train.labels, cell.shots, cell.seed, on_short="ignore") for cell in cells}
    options: dict[str, Any] = {"recipe": recipe, "disable_tqdm": True}
    trainer = TaskResTrainer(model, TaskResTrainingArguments(**options))
    test = trainer.embed(splits["test"])
    settings = {"recipe": recipe, "views": PAPER_VIEWS if recipe == "paper" else 0}
    needed = sorted({row for drawn in rows.values() for row in drawn})
    place = {row: position for position, row in enumerate(needed)}
    embedded = None if settings["views"] else trainer.embed(train.select(needed))

    def drawn(cell: Cell) -> ImageFeatures | LabelledImages:
        if embedded is None:
            return train.select(rows[cell])
        return embedded.select([place[row] for row in rows[cell]])

    for cell, scores in few_shot_runs(model, cells, drawn, lambda _: {"": (test, None)}, lambda _: settings):
        on_run()
        zero_shot, trained = scores[""]
        yield {**asdict(cell), "zero_shot_accuracy": zero_shot, "accuracy": trained, "targets": {}}


@torch.no_grad()
def accuracies(
    model: TaskResCLIPForImageClassification, test: ImageFeatures, rows: Sequence[int] | None = None
) -> tuple[float, float]:
    """Zero-shot and trained accuracy; with `rows`, only those classes compete (ImageNet-A and -R)."""
    head, pair = model.classifier, []
    for logits in (head.zero_shot_logits(test.image_embeds[0]), head(test.image_embeds[0])):
        if rows is not None:
            allowed = torch.full_like(logits, float("-inf"))
            allowed[:, list(rows)] = 0.0
            logits = logits + allowed
        pair.append(accuracy(logits, test.labels))
    return pair[0], pair[1]


def run_benchmark(
    base_model: str,
    datasets: Sequence[str],
    output_dir: str | os.PathLike[str] | None = None,
    *,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    recipes: Sequence[str] = ("paper", "auto"),
    root: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    views: int | None = None,
    augment_online: bool = False,
    enhanced_base: bool = False,
    keep_underscores: bool | None = None,
    targets: Sequence[str] | None = None,
    allow_other_split: bool = False,
    arguments: Mapping[str, Any] | None = None,
    on_cell: Callable[[Cell, dict[str, Any], bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Train and measure every dataset x shots x seed x recipe; what is finished is not run again.

    Each finished cell is a small JSON file in `output_dir/cells`, written in one step; the drawn pictures are in
    `output_dir/few_shot`. Every picture is embedded once for each way of embedding.

    Recipe `"paper"` is the published whole: augmented pictures, class names with their underscores, the dataset's own
    alpha and learning rate, epochs by the shots asked for, and embeddings in fp32 by torch. The other recipes take
    plain pictures and names with spaces. What ran is in each cell.

    Args:
        base_model: Hub id or folder. root: see `open_dataset`. revision: of the base model.
        output_dir: None writes nothing and resumes nothing.
        recipes: of `TaskResTrainingArguments`.
        views: augmented views cached per picture, for all recipes; None for 10 with `"paper"` and none with the others.
        augment_online: recipe `"paper"` augments and embeds afresh every epoch, exactly as published, and slowly.
        keep_underscores: whether prompts have the underscores of class names, for all recipes; None as said above.
        targets: further datasets with the same classes to evaluate each run on; None for the ones the dataset names.
        arguments: further settings of `TaskResTrainingArguments`.
        on_cell: called with each cell, its result and whether it was already finished.

    Returns:
        One dict per cell: dataset, shots, seed, recipe, zero_shot_accuracy, accuracy (from 0 to 1), num_images,
        train_images, `seen_in_training` (test pictures that were drawn, by content), `targets` with both accuracies
        each, the settings, and what ran: `base` (the base's fingerprint), `pictures` (their digests), `engine`,
        `training`.

    Raises:
        DataError: before the first run, if a dataset is not complete.
        ConfigurationError: `output_dir` holds cells of other settings, other pictures, another base or another engine.
    """
    options = dict(arguments or {})
    settings: dict[str, Any] = {
        "base_model": base_model, "revision": revision, "views": views, "augment_online": augment_online,
        "enhanced_base": enhanced_base, "keep_underscores": keep_underscores,
        "arguments": {key: value for key, value in options.items() if key not in CHANGE_NOTHING},
    }  # fmt: skip
    results = []
    opened = {name: open_dataset(name, root, allow_other_split=allow_other_split) for name in datasets}
    for name, data in opened.items():
        wanted = describe_dataset(name).get("targets", []) if targets is None else list(targets)
        cells = grid(name, shots, seeds, recipes)
        folder = None if output_dir is None else Path(output_dir)
        run = _DatasetRun(data, settings, options, wanted, cells, root, allow_other_split)
        done = {} if folder is None else {cell: run.stored(folder / "cells" / cell.file_name, cell) for cell in cells}
        for cell in cells:
            result = done.get(cell) or run.cell(cell, folder)
            results.append(result)
            if on_cell is not None:
                on_cell(cell, result, done.get(cell) is not None)
    return results


class _DatasetRun:
    """Everything the runs of one dataset share, made when first needed: models, draws, embeddings."""

    def __init__(
        self,
        data: PaperData,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        targets: Sequence[str],
        cells: Sequence[Cell],
        root: Any,
        allow_other_split: bool,
    ) -> None:
        self.data, self.settings, self.options = data, settings, options
        self.spec = describe_dataset(data.name)
        self.has_underscores = any("_" in data.prompt_names.get(name, name) for name in data.class_names)
        self.target_names, self.root, self.allow_other_split = list(targets), root, allow_other_split
        labels = data.splits["train"].labels
        self.draws = {
            (cell.shots, cell.seed): few_shot_indices(labels, cell.shots, cell.seed, on_short="ignore")
            for cell in cells
        }
        self._models: dict[bool, TaskResCLIPForImageClassification] = {}
        self._embedded: dict[Any, ImageFeatures] = {}
        self._engines: dict[str, tuple[str, str]] = {}
        self._measured: dict[str, str] = {}

    # ------------------------------------------------------------------ what a recipe means here

    def arguments(self, recipe: str, views: int = 0) -> dict[str, Any]:
        """Settings of a run of this recipe, besides its seed and epochs."""
        online = self.settings["augment_online"] and recipe == "paper"
        values = {"recipe": recipe, "views": 0 if online else views, "augment_online": online, **self.options}
        if recipe == "paper" and "learning_rate" in self.spec:
            values.setdefault("learning_rate", self.spec["learning_rate"])
        return {**values, "enhanced_base": self.settings["enhanced_base"]}

    def views(self, recipe: str) -> int:
        if recipe == "paper" and self.settings["augment_online"]:
            return 0
        views = self.settings["views"]
        return int(views) if views is not None else PAPER_VIEWS if recipe == "paper" else 0

    def model(self, recipe: str) -> TaskResCLIPForImageClassification:
        """The classifier of a recipe; recipes with the same prompts share it, and all share the base."""
        keep = self.settings["keep_underscores"]
        keep = recipe == "paper" if keep is None else keep
        keep = keep and self.has_underscores
        if keep not in self._models:
            first = next(iter(self._models.values()), None)
            self._models[keep] = TaskResCLIPForImageClassification.from_base(
                self.settings["base_model"] if first is None else first.clip,
                self.data.class_names,
                self.spec.get("template") or self.spec["template_set"],
                self.spec["alpha"],
                prompt_names=self.data.prompt_names or None,
                underscores="keep" if keep else "replace",
                revision=self.settings["revision"],
                tokenizer=None if first is None else first.tokenizer,
                image_processor=None if first is None else first.image_processor,
            )
        return self._models[keep]

    def engine(self, recipe: str) -> tuple[str, str]:
        """Name of the engine that embeds for a recipe, and a digest of all that its embeddings depend on."""
        if recipe not in self._engines:
            embedder = self._trainer(recipe, 0, 1).embedder
            self._engines[recipe] = (embedder.engine.name, json.dumps(embedder.key))
        return self._engines[recipe]

    # ------------------------------------------------------------------ runs

    def stored(self, path: Path, cell: Cell) -> dict[str, Any] | None:
        """A finished cell, if it was run on this base and these pictures, with this engine and these settings.

        Raises:
            ConfigurationError: it was not; says what differs.
        """
        result = read_cell(path)
        if result is None:
            return None
        now = {
            "settings": plain(self.settings), "targets": sorted(self.target_names),
            "engine": self.engine(cell.recipe)[0], "notes": self.data.notes,
        }  # fmt: skip
        then = {**result, "targets": sorted(result.get("targets", {}))}
        base = self.model(cell.recipe).config.base_fingerprint
        require_same_run(path, then, now, base, self.data.name, lambda: self.pictures(cell))
        return result

    def pictures(self, cell: Cell) -> dict[str, str]:
        """What tells whether a run is drawn from, and measured on, the same pictures and labels: digests of both."""
        train = self.data.splits["train"]
        digests = {"drawn": content_digest(train.select(self.draws[cell.shots, cell.seed]))}
        for name in (self.data.name, *self.target_names):
            if name not in self._measured:
                self._measured[name] = content_digest(self._opened(name).splits["test"])
            digests[name] = self._measured[name]
        return digests

    def cell(self, cell: Cell, folder: Path | None) -> dict[str, Any]:
        """Run a cell and, with a folder, store its draw and its result."""
        rows, model = self.draws[cell.shots, cell.seed], self.model(cell.recipe)
        if folder is not None:
            write_draw(folder, cell.dataset, cell.shots, cell.seed, self.data.splits["train"], rows)
        ((_, scores),) = few_shot_runs(model, [cell], self._train, self._tests, self._settings)
        zero_shot, trained = scores.pop("")
        test = self._test(self.data.name, cell.recipe)[0]
        drawn = {self.data.splits["train"].digest(row) for row in rows}
        result = {
            **asdict(cell), "zero_shot_accuracy": zero_shot, "accuracy": trained, "num_images": len(test),
            "train_images": len(rows), "seen_in_training": sum(digest in drawn for digest in test.digests),
            "pictures": self.pictures(cell),
            "settings": plain(self.settings), "notes": self.data.notes,
            "targets": {name: {"zero_shot_accuracy": pair[0], "accuracy": pair[1]} for name, pair in scores.items()},
            "base": model.config.base_fingerprint, "base_model_type": model.config.base_model_type,
            "engine": self.engine(cell.recipe)[0],
            "training": {
                **(model.config.training or {}), "engine": self.engine(cell.recipe)[0], "alpha": model.config.alpha,
                "views": self.views(cell.recipe),
                "underscores": model.config.underscores if self.has_underscores else "none",
            },
            "library_versions": library_versions(),
        }  # fmt: skip
        if folder is not None:
            write_sealed(folder / "cells" / cell.file_name, result)
        return dict(plain(result))

    def _settings(self, cell: Cell) -> dict[str, Any]:
        values = self.arguments(cell.recipe, self.views(cell.recipe))
        if cell.recipe == "paper":  # what was asked for decides, not what short classes have
            values.setdefault("num_train_epochs", published_epochs(cell.shots))
        return values

    def _train(self, cell: Cell) -> ImageFeatures | LabelledImages:
        """The drawn pictures' embeddings, out of those of every picture that any draw needs."""
        rows, train = self.draws[cell.shots, cell.seed], self.data.splits["train"]
        if self.arguments(cell.recipe)["augment_online"]:
            return train.select(rows)
        views = self.views(cell.recipe)
        drawn = [part for (_, seed), part in self.draws.items() if not views or seed == cell.seed]
        needed = sorted({row for part in drawn for row in part})
        key = ("train", views, cell.seed if views else 0, self.engine(cell.recipe)[1])
        if key not in self._embedded:
            self._embedded[key] = self._trainer(cell.recipe, views, cell.seed).embed(train.select(needed), views=views)
        place = {row: position for position, row in enumerate(needed)}
        return self._embedded[key].select([place[row] for row in rows])

    def _tests(self, cell: Cell) -> Tests:
        """The dataset's test split under the name "", and its targets under their own."""
        tests = {"": self._test(self.data.name, cell.recipe)}
        return tests | {name: self._test(name, cell.recipe) for name in self.target_names}

    def _test(self, name: str, recipe: str) -> tuple[ImageFeatures, list[int] | None]:
        data, rows = self._opened(name), None
        if name != self.data.name:
            wnids = describe_dataset(name).get("wnids")
            order = {wnid: index for index, wnid in enumerate(self.spec["all_wnids"] or [])}
            rows = sorted(order[wnid] for wnid in wnids) if wnids else sorted(set(data.splits["test"].labels))
        key = (name, self.engine(recipe)[1])
        if key not in self._embedded:
            self._embedded[key] = self._trainer(recipe, 0, 1).embed(data.splits["test"])
        self._measured[name] = self._embedded[key].digest
        return self._embedded[key], rows

    def _opened(self, name: str) -> PaperData:
        if name == self.data.name:
            return self.data
        data = open_dataset(name, self.root, allow_other_split=self.allow_other_split)
        if data.class_names != self.data.class_names:
            raise DataError(f"{name} does not have the classes of {self.data.name}.")
        return data

    def _trainer(self, recipe: str, views: int, seed: int) -> TaskResTrainer:
        """A trainer that only embeds."""
        values = {**self.arguments(recipe, views), "augment_online": False, "seed": seed, "disable_tqdm": True}
        return TaskResTrainer(self.model(recipe), TaskResTrainingArguments(**values))
