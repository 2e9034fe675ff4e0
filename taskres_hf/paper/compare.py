"""Few-shot methods on the same pictures, draws and embeddings: `compare_methods` behind `taskres compare`.

What is reported of its results stands in `paper.comparison`.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import library_versions
from ..data.labelled import LabelledImages
from ..embedding.features import ImageFeatures, content_digest
from ..errors import ConfigurationError, DataError, TaskResError
from ..evaluation import accuracy, expected_calibration_error
from ..few_shot import few_shot_indices
from ..methods.method import METHODS, Fitted
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..storage import write_sealed
from ..training.arguments import TaskResTrainingArguments
from ..training.trainer import TaskResTrainer
from .cells import CHANGE_NOTHING, plain, read_cell, require_same_run, run_cells, write_draw
from .comparison import write_results
from .memory import PeakMemory
from .tasks import Task, open_tasks

# Those that need nothing but embeddings and fit in seconds on a CPU.
DEFAULT_METHODS = (
    "zero-shot", "class-mean", "linear-probe", "linear-probe-cv", "cross-modal", "clap", "lp++", "gda", "tip-adapter",
    "tip-adapter-f", "ape", "ape-t", "clip-adapter", "prolip", "proker", "taskres", "taskres-paper",
)  # fmt: skip
_ROWS = 4096  # test pictures whose logits are made at a time: a cache of shots compares each with every shot


@dataclass(frozen=True)
class MethodCell:
    """One fit: a method on a dataset, with a number of shots and a seed."""

    method: str
    dataset: str
    shots: int
    seed: int

    @property
    def place(self) -> str:
        """The dataset's name as a part of a file's name."""
        return re.sub(r"[^\w.+-]", "_", self.dataset.replace("/", "--"))

    @property
    def file_name(self) -> str:
        method = re.sub(r"[^\w.+-]", "_", self.method)
        return f"{self.place}-{self.shots}shots-seed{self.seed}-{method}.json"


def known_methods() -> list[str]:
    """Names of all methods: those of this library and those registered with `register_method`."""
    import_module("..methods.all", __package__)
    return list(METHODS)


def choose_methods(names: Sequence[str] | str | None = None) -> list[str]:
    """Names of methods, each once.

    Args:
        names: `"default"` (also None) for those that fit in seconds on a CPU, `"all"`, or names; both words may stand
            among names.

    Raises:
        ConfigurationError: there is no such method.
    """
    known = known_methods()
    groups = {"all": known, "default": [name for name in DEFAULT_METHODS if name in known]}
    wanted = ["default"] if names is None else [names] if isinstance(names, str) else list(names)
    chosen = list(dict.fromkeys(member for name in wanted for member in groups.get(name, [name])))
    if unknown := [name for name in chosen if name not in known]:
        raise ConfigurationError(f"There is no method {unknown[0]!r}; there are {', '.join(known)}.")
    if not chosen:
        raise ConfigurationError("There is nothing to compare: name a method.")
    return chosen


def compare_methods(
    base_model: str,
    data: Any,
    output_dir: str | os.PathLike[str] | None = None,
    *,
    methods: Sequence[str] | str | None = None,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    templates: str | Sequence[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    allow_other_split: bool = False,
    holdout: float | None = None,
    reading: Mapping[str, Any] | None = None,
    revision: str | None = None,
    views: int = 0,
    arguments: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] | None = None,
    on_cell: Callable[[MethodCell, dict[str, Any], bool], None] | None = None,
) -> list[dict[str, Any]]:
    """Fit and measure every method x dataset x shots x seed; what is finished is not run again.

    All methods see the same draws and the same embeddings, and are measured on the same pictures. Each picture passes
    the backbone once, training pictures once a seed and view with `views`. Methods are fitted on the CPU; those that
    need a tower use the model where it is.

    Args:
        base_model: Hub id or folder. revision: its branch, tag or commit.
        data, root, allow_other_split, templates, holdout, reading: see `open_tasks`.
        output_dir: finished fits go to `output_dir/cells`, the draws to `output_dir/few_shot`, and after each fit a
            row to `output_dir/results.csv`; None writes nothing and resumes nothing.
        methods: see `choose_methods`.
        shots: of each class; a class with fewer pictures gives all it has.
        views: augmented views of each training picture instead of the plain one, drawn from the seed.
        arguments: settings of `TaskResTrainingArguments` that say how pictures are embedded.
        on_start: called with the number of cells.
        on_cell: called with each cell, its result and whether it was already finished.

    Returns:
        One dict a cell. `method`, `dataset`, `shots`, `seed`, and either `error` (why there is no result; nothing is
        stored of it) or `accuracy` and `ece` from 0 to 1, both also as `zero_shot_...`, `trained_parameters`,
        `fit_seconds`, `peak_memory` (bytes that fitting took at most, None where it cannot be told), `linear` (whether
        it can be saved as a residual), `not_linear`, `selected`, `selected_on`, `num_images`, `train_images`,
        `seen_in_training` (test pictures that were drawn, by content), `notes`, and what ran: `settings`, `base`,
        `pictures`, `engine`.

    Raises:
        DataError: before the first fit, if a dataset cannot be read.
        ConfigurationError: no such method; or `output_dir` holds fits of other settings, pictures, base or engine.
    """
    chosen = choose_methods(methods)
    tasks = open_tasks(
        data, root=root, allow_other_split=allow_other_split, templates=templates, holdout=holdout, reading=reading
    )
    _load_libraries()
    folder = None if output_dir is None else Path(output_dir)
    results: list[dict[str, Any]] = []
    settings = {"base_model": str(base_model), "revision": revision, "views": views}
    for cell, result, was_done in run_tasks(tasks, chosen, folder, settings, arguments, shots, seeds, on_start):
        results.append(result)
        if folder is not None and not was_done:
            write_results(results, folder)
        if on_cell is not None:
            on_cell(cell, result, was_done)
    if folder is not None:
        write_results(results, folder)
    return results


def run_tasks(
    tasks: Sequence[Task],
    names: Sequence[str],
    folder: Path | None,
    settings: Mapping[str, Any],
    arguments: Mapping[str, Any] | None,
    shots: Sequence[int],
    seeds: Sequence[int],
    on_start: Callable[[int], None] | None = None,
    kind: type[TaskRun] | None = None,
) -> Iterator[tuple[MethodCell, dict[str, Any], bool]]:
    """Every name x task x shots x seed; what is finished in `folder` is not run again.

    Args:
        names: of methods, or of whatever `kind` measures. settings: what a finished cell must have been made with.
        arguments, shots, seeds, on_start: of `compare_methods`. kind: makes the runs on a task; by default `TaskRun`.

    Yields:
        Each cell, its result and whether it was already finished.
    """
    options = dict(arguments or {})
    used = {key: value for key, value in options.items() if key not in CHANGE_NOTHING}
    settings = plain({**settings, "arguments": used})
    shared: TaskResCLIPForImageClassification | None = None
    if on_start is not None:
        on_start(len(tasks) * len(shots) * len(seeds) * len(names))
    for task in tasks:
        run = (kind or TaskRun)(task, settings, options, shots, seeds, shared)
        shared = run.model
        cells = [MethodCell(name, task.name, count, seed) for count in shots for seed in seeds for name in names]
        yield from run_cells(cells, folder, run.stored, run.cell)


class TaskRun:
    """Everything the fits on one task share, made when first needed: draws, embeddings, zero-shot."""

    def __init__(
        self,
        task: Task,
        settings: Mapping[str, Any],
        options: Mapping[str, Any],
        shots: Sequence[int],
        seeds: Sequence[int],
        like: TaskResCLIPForImageClassification | None,
    ) -> None:
        self.task, self.options, self.views = task, options, int(settings["views"])
        held = None if task.test is not None else task.holdout
        self.settings = {**settings, "templates": plain(task.templates), "holdout": held}
        self.model = TaskResCLIPForImageClassification.from_base(
            settings["base_model"] if like is None else like.clip, task.train.class_names, task.templates, task.alpha,
            prompt_names=task.prompt_names or None, revision=settings["revision"],
            tokenizer=None if like is None else like.tokenizer,
            image_processor=None if like is None else like.image_processor,
        )  # fmt: skip
        self.base = self.model.config.base_fingerprint
        self.parts = {seed: task.parts(seed) for seed in seeds}
        self.draws: dict[tuple[int, int], list[int]] = {}
        for seed, (pool, _) in self.parts.items():
            labels = [task.train.labels[row] for row in pool]
            for count in shots:
                drawn = few_shot_indices(labels, count, seed, on_short="ignore")
                self.draws[count, seed] = [pool[position] for position in drawn]
        self._embedder = self._trainer(1)
        self._embedded: dict[Any, tuple[ImageFeatures, dict[int, int]]] = {}
        self._digests: dict[Any, str] = {}

    # ------------------------------------------------------------------ finished fits

    def stored(self, path: Path, cell: MethodCell) -> dict[str, Any] | None:
        """A finished fit, if it was made on this base and these pictures, with this engine and these settings.

        Raises:
            ConfigurationError: it was not; says what differs.
        """
        result = read_cell(path)
        if result is None:
            return None
        now = {**asdict(cell), "settings": self.settings, "engine": self._embedder.embedder.engine.name}
        require_same_run(path, result, now, self.base, self.task.name, lambda: self.pictures(cell))
        return result

    def pictures(self, cell: MethodCell) -> dict[str, str]:
        """Digests of the pictures and labels that a fit is drawn from and measured on."""
        images, rows = self.measured(cell.seed)
        parts = {
            "drawn": (("drawn", cell.shots, cell.seed), self.task.train, self.draws[cell.shots, cell.seed]),
            "measured": (("measured", cell.seed if rows is not None else 0), images, rows),
        }
        for key, of, chosen in parts.values():
            if key not in self._digests:
                self._digests[key] = content_digest(of if chosen is None else of.select(chosen))
        return {name: self._digests[key] for name, (key, _, _) in parts.items()}

    # ------------------------------------------------------------------ embeddings

    def measured(self, seed: int) -> tuple[LabelledImages, list[int] | None]:
        """Pictures that hold those to measure on, and which of them (None: all)."""
        return (self.task.train, self.parts[seed][1]) if self.task.test is None else (self.task.test, None)

    def train_rows(self, cell: MethodCell) -> list[int]:
        """Positions of the drawn pictures; without those that could not be read and were to be left out."""
        place = self._training(cell.seed)[1]
        return [row for row in self.draws[cell.shots, cell.seed] if row in place]

    def train(self, cell: MethodCell) -> ImageFeatures:
        features, place = self._training(cell.seed)
        return features.select([place[row] for row in self.train_rows(cell)])

    def _training(self, seed: int) -> tuple[ImageFeatures, dict[int, int]]:
        """Embeddings of every picture that any draw needs, and where each is."""
        if not self.views and self.task.test is None:
            return self._embed("all", self.task.train, range(len(self.task.train)))
        drawn = [rows for (_, other), rows in self.draws.items() if not self.views or other == seed]
        needed = sorted({row for rows in drawn for row in rows})
        return self._embed(("train", seed if self.views else 0), self.task.train, needed, self.views, seed)

    def test(self, seed: int) -> ImageFeatures:
        rows = self.measured(seed)[1]
        features, place = self._measured_on(seed)
        return features if rows is None else features.select([place[row] for row in rows if row in place])

    def test_pictures(self, seed: int) -> LabelledImages:
        """The pictures whose embeddings `test` gives."""
        images, rows = self.measured(seed)
        place = self._measured_on(seed)[1]
        return images.select([row for row in (place if rows is None else rows) if row in place])

    def _measured_on(self, seed: int) -> tuple[ImageFeatures, dict[int, int]]:
        images = self.measured(seed)[0]
        return self._embed("all", images, range(len(images)))

    def _embed(
        self, key: Any, images: LabelledImages, rows: Sequence[int], views: int = 0, seed: int = 1
    ) -> tuple[ImageFeatures, dict[int, int]]:
        if key not in self._embedded:
            trainer = self._trainer(seed) if views else self._embedder
            features = trainer.embed(images.select(rows), views=views)
            lost = set(features.skipped)
            kept = [row for position, row in enumerate(rows) if position not in lost]
            self._embedded[key] = (features, {row: position for position, row in enumerate(kept)})
        return self._embedded[key]

    def _trainer(self, seed: int) -> TaskResTrainer:
        """A trainer that only embeds."""
        arguments = {"disable_tqdm": True, **self.options, "seed": seed}
        return TaskResTrainer(self.model, TaskResTrainingArguments(**arguments))

    # ------------------------------------------------------------------ fits

    def cell(self, cell: MethodCell, folder: Path | None) -> dict[str, Any]:
        """Fit and measure and, with a folder, store the draw and the result; with `error` where it went wrong."""
        train, test = self.train(cell), self.test(cell.seed)
        if folder is not None:
            rows = self.draws[cell.shots, cell.seed]
            write_draw(folder, cell.dataset, cell.shots, cell.seed, self.task.train, rows, cell.place)
        try:
            measured = self._measured(cell, train, test)
        except Exception as error:  # whatever a method does wrong, the others go on
            return {**asdict(cell), "error": _reason(error)}
        drawn = set(train.digests)
        result = {
            **asdict(cell), **measured, "num_images": len(test), "train_images": len(train),
            "seen_in_training": sum(digest in drawn for digest in test.digests),
            "notes": self.task.notes, "settings": self.settings, "base": self.base, "pictures": self.pictures(cell),
            "engine": self._embedder.embedder.engine.name, "library_versions": library_versions(),
        }  # fmt: skip
        if folder is not None:
            write_sealed(folder / "cells" / cell.file_name, result)
        return dict(plain(result))

    def _measured(self, cell: MethodCell, train: ImageFeatures, test: ImageFeatures) -> dict[str, Any]:
        # A copy, so that no method can change what the next one starts from.
        classifier = copy.deepcopy(self.model.classifier).cpu()
        method, pictures = METHODS[cell.method](), {}
        if "pictures" in method.needs:
            pictures["images"] = self.task.train.select(self.train_rows(cell))
        with PeakMemory() as memory:
            fitted = method.fit(train, classifier, seed=cell.seed, model=self.model, **pictures)
        embeds = test.image_embeds[0] if fitted.embed is None else fitted.embed(self.test_pictures(cell.seed))
        logits = _logits(fitted, embeds, len(test.class_names))
        before = self.model.classifier.zero_shot_logits(test.image_embeds[0]).detach().cpu()
        return {
            "accuracy": accuracy(logits, test.labels), "ece": expected_calibration_error(logits, test.labels),
            "zero_shot_accuracy": accuracy(before, test.labels),
            "zero_shot_ece": expected_calibration_error(before, test.labels),
            "trained_parameters": int(fitted.trained_parameters), "fit_seconds": float(fitted.fit_seconds),
            "peak_memory": memory.bytes, "linear": fitted.linear is not None, "not_linear": fitted.not_linear,
            "selected": {key: _number(value) for key, value in fitted.selected.items()},
            "selected_on": fitted.selected_on,
        }  # fmt: skip


@torch.no_grad()
def _logits(fitted: Fitted, embeds: Tensor, classes: int) -> Tensor:
    """Logits [N, K] of the test pictures.

    Raises:
        DataError: of another shape, or not numbers.
    """
    logits = torch.cat([fitted.logits(part).detach().float().cpu() for part in embeds.split(_ROWS)])
    if logits.shape != (len(embeds), classes):
        raise DataError(f"Logits of shape {list(logits.shape)} for {len(embeds)} pictures and {classes} classes.")
    if not bool(torch.isfinite(logits).all()):
        raise DataError("Some logits are NaN or infinite.")
    return logits


def _load_libraries() -> None:
    """Load what fitting uses, so that no method's first fit pays for it in seconds and memory."""
    for name in ("scipy.optimize", "sklearn.linear_model", "sklearn.covariance"):
        import_module(name)


def _reason(error: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, (TaskResError, ImportError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _number(value: Any) -> Any:
    """A chosen value as JSON has it."""
    return (
        value.tolist()
        if isinstance(value, Tensor)
        else value
        if isinstance(value, (bool, int, float, str))
        else str(value)
    )
