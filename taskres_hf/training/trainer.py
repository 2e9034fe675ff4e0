"""`TaskResTrainer`: frozen embeddings once, then epochs over them; and an honest number for the outcome."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.trainer_utils import PredictionOutput, TrainOutput
from transformers.utils import logging

from ..data import LabelledImages
from ..embedding import Embedder, ImageFeatures, StoredFeatures
from ..errors import ConfigurationError, DataError
from ..evaluation import loss_to_zero_shot
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..notebook import ShownMetrics
from ..rejection import Rejection, checked_rate
from ..residual import TaskResClassifier
from .arguments import TaskResTrainingArguments
from .callbacks import EpochBar, EpochFlow, Events, Trackers
from .enhanced_base import EPOCHS, enhance, published_base
from .measuring import (
    ComputeMetrics,
    Metrics,
    OnlyTrainingPicturesError,
    OutOfFold,
    both_logits,
    check_rejectable,
    choose_rejection,
    cross_validated_metrics,
    epoch_metrics,
    full_metrics,
    goes_on_from,
    out_of_fold,
    own_metrics,
    prefixed,
    rejected_share,
    remember,
    remember_start,
    split_name,
    warn_of_conflicts,
    without_training_pictures,
)
from .recipes import Recipe, published_alpha, recipe_for, why_epochs
from .run import TrainingRun, check_epoch_choice, describe_run
from .shots import DatasetEmbeddings, TrainingPictures, at_once, training_pictures
from .steps import Batches, batches_augmented, batches_from_disk, batches_in_memory, batches_whole, fit, make_step

logger = logging.get_logger(__name__)


class TaskResTrainer:
    """Trains the residual of a `TaskResCLIPForImageClassification`.

    Args:
        model: the classifier; trained in place.
        args: see `TaskResTrainingArguments`.
        train_dataset, eval_dataset: a `datasets.Dataset` with pictures and labels (matched to the model's classes by
            name), a `LabelledImages`, or `ImageFeatures` already computed.
        image_processor: found by the model when None.
        callbacks: `transformers.TrainerCallback` classes or objects. They get the usual events, `TrainerState` and
            `TrainerControl`; `should_training_stop` ends the run at once, checkpoints are written at ends of epochs.
        compute_metrics: `transformers.EvalPrediction` (logits [N, K], labels [N]) to a dict, added to every
            measurement; names of ours, such as `accuracy`, keep our meaning.

    Attributes:
        log_history: one dict per epoch: epoch, loss, accuracy, learning_rate, and eval_accuracy and so on if measured.
        state, control: as in `transformers.Trainer`.
    """

    def __init__(
        self,
        model: TaskResCLIPForImageClassification,
        args: TaskResTrainingArguments | None = None,
        train_dataset: Dataset | LabelledImages | ImageFeatures | StoredFeatures | None = None,
        eval_dataset: Dataset | LabelledImages | ImageFeatures | None = None,
        image_processor: Any = None,
        callbacks: Sequence[Any] | None = None,
        compute_metrics: ComputeMetrics | None = None,
    ) -> None:
        if not isinstance(args, (TaskResTrainingArguments, NoneType)):
            raise ConfigurationError(
                f"args must be TaskResTrainingArguments; got {type(args).__name__}. To train with "
                "transformers.TrainingArguments, use transformers.Trainer: a classifier is an ordinary model."
            )
        self.model = model
        self.args = args or TaskResTrainingArguments()
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.compute_metrics = compute_metrics
        if image_processor is not None:
            model.image_processor = image_processor
        self.accelerator = Accelerator(
            cpu=self.args.use_cpu, log_with=self.args.report_to or None, project_dir=self.args.output_dir
        )
        if getattr(model, "hf_device_map", None) is None and getattr(model.clip, "hf_device_map", None) is None:
            model.to(self.accelerator.device)
        own: list[Any] = [EpochFlow(), EpochBar()] + ([Trackers(self.accelerator)] if self.args.report_to else [])
        self._events = Events(self.args, model, own + list(callbacks or []))
        self._embeddings = DatasetEmbeddings(model, self.args, self.accelerator)
        self._chosen: tuple[Any, TrainingPictures] | None = None
        self._events("on_init_end")

    # ------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None) -> TrainOutput:
        """Train the residual.

        Of a classifier that was trained before, recipe `auto` keeps nothing: it fits from zero-shot, with a warning
        where the pictures are others. Recipes by epochs go on from its residual (after `auto` from zero-shot), which
        keeps what it learned as far as the new pictures leave it.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest in `output_dir` that is whole. The
                settings, the base and the data must be those of the interrupted run; the result then equals an
                uninterrupted run, bit for bit in one process on a CPU.

        Returns:
            `TrainOutput` with the number of steps, the last epoch's loss and its metrics.

        Raises:
            DataError: no training data, unlabelled or unknown classes. FewShotError: a class without any picture, or
                too few for `args.reject`.
            ConfigurationError: the checkpoint is of another run, training diverged, the epoch would be chosen on a
                test split, or the classifier has a strength, a bias or lengths of its own (`check_trainable`).
        """
        events = self._events
        chooses = check_epoch_choice(
            self.args, self.eval_dataset, split_name(self.eval_dataset), events.handler.callbacks
        )
        chosen, held_out = self._training_pictures(), None
        head = self.model.classifier
        if self.args.reject is not None:
            check_rejectable(self._foldable()[1], self.args.reject, self.args.seed)
        if self.args.recipe == "paper":
            self._write_as_published(head)
        recipe = self._recipe(head, chosen.data)
        before = goes_on_from(self.model.config, head, recipe.name, chosen.data.digest)
        if recipe.name != "auto":
            if (self.model.config.training or {}).get("recipe") == "auto":
                head.reset()  # epochs cannot go on from what was fitted at once
            head.check_trainable()
        if self.args.recipe == "auto" and recipe.name != "auto":
            why = why_epochs(self.args, head, isinstance(chosen.data, StoredFeatures))
            logger.info("Recipe auto fits all at once; %s: recipe auto-v1, which trains by epochs, is used.", why)
        if recipe.name == "auto":
            chosen = at_once(chosen)
        self._record(recipe, chosen)
        if before is not None:
            remember_start(self.model.config, before)
        if self.args.enhanced_base:
            enhance(self.model, head, chosen.data, self.args.seed)
            stamp = {"epochs": EPOCHS, "data_digest": chosen.data.digest, "seed": self.args.seed}
            self.model.config.enhanced_base = stamp
        if self.eval_dataset is not None and self.args.evaluates_epochs:
            held_out = self._new_pictures(self.eval_dataset)
            if chooses and self.model.config.data is not None:
                self.model.config.data["epoch_chosen_on"] = held_out.digest

        def measure() -> Metrics:
            return epoch_metrics(head, held_out or self._new_pictures(self.eval_dataset), self.compute_metrics)

        embedder = None if chosen.images is None else self.embedder
        description = describe_run(self.model, self.args, recipe, chosen, embedder, held_out)
        run = TrainingRun(
            self.model, self.args, recipe, chosen, description, events, self.accelerator,
            None if self.eval_dataset is None else measure,
        )  # fmt: skip
        if resume_from_checkpoint:
            run.resume(resume_from_checkpoint)
        views = 1 if isinstance(chosen.data, StoredFeatures) else chosen.data.image_embeds.shape[0]
        step = make_step(head, run.optimizer, recipe, self.args.closed_form, self.accelerator, views)
        run.train(self._batches(chosen, recipe), step)
        if run.best.residual is not None and self.model.config.training is not None:
            self.model.config.training |= {"epochs_run": run.epoch, "best_epoch": run.best.epoch}
        if self.args.reject is not None:
            self.choose_rejection(self.args.reject)
        if self.args.push_to_hub and self.accelerator.is_main_process:
            self.push_to_hub()
        log = self.log_history[-1] if self.log_history else {}
        return TrainOutput(self.state.global_step, float(log.get("loss", float("nan"))), dict(log))

    @property
    def state(self) -> TrainerState:
        """As in `transformers.Trainer`."""
        return self._events.state

    @property
    def control(self) -> TrainerControl:
        """As in `transformers.Trainer`."""
        return self._events.control

    @property
    def callback_handler(self) -> CallbackHandler:
        """As in `transformers.Trainer`."""
        return self._events.handler

    def add_callback(self, callback: Any) -> None:
        """Add a `transformers.TrainerCallback`, as in `transformers.Trainer`."""
        self._events.handler.add_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, by object or class, as in `transformers.Trainer`."""
        self._events.handler.remove_callback(callback)

    @property
    def log_history(self) -> list[Metrics]:
        """One dict per epoch."""
        return self.state.log_history

    def _batches(self, chosen: TrainingPictures, recipe: Recipe) -> Batches:
        head, args = self.model.classifier, self.args
        if recipe.name == "auto" and isinstance(chosen.data, ImageFeatures):
            return batches_whole(chosen.data, head)
        share = (self.accelerator.num_processes, self.accelerator.process_index)
        if isinstance(chosen.data, StoredFeatures):
            return batches_from_disk(chosen.data, head, recipe, args.seed, args.buffer_mb, *share)
        if chosen.online and chosen.images is not None:
            digests, turn = chosen.data.digests, args.embed_batch_size
            return batches_augmented(chosen.images, digests, self.embedder, head, recipe, args.seed, turn, *share)
        return batches_in_memory(chosen.data, head, recipe, args.seed, *share)

    def _recipe(self, head: TaskResClassifier, data: ImageFeatures | StoredFeatures) -> Recipe:
        return recipe_for(self.args, head, data.labels, isinstance(data, StoredFeatures))

    def _write_as_published(self, head: TaskResClassifier) -> None:
        """Underscores of class names in prompts and the dataset's `alpha`, as in the published code."""
        made = published_base(self.model)
        head.alpha = published_alpha(head.alpha, self.args.dataset_name)
        if made is not None:
            head.base.copy_(made[0].to(head.base))
        if head is self.model.classifier:
            self.model.config.alpha = head.alpha
            if made is not None:
                self.model.config.underscores, self.model.config.base_fingerprint = "keep", made[1]

    # ------------------------------------------------------------------ measuring

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "", include_train_pictures: bool = False
    ) -> Metrics:
        """Metrics on the evaluation set, zero-shot beside trained.

        Pictures that the residual was trained on, recognised by their content, are left out with a warning.

        Args:
            eval_dataset: by default the trainer's own, whose metrics are recorded in the model's config, for the card.
            include_train_pictures: measure on those pictures too; nothing is recorded then.

        Returns:
            `accuracy`, `zero_shot_accuracy`, `macro_f1`, `loss`, `num_images`, `accuracy_interval` (95 %) and
            `per_class`, shares from 0 to 1; where a threshold was chosen, `rejected`, the share of these pictures that
            `model.rejects`, and `accuracy_of_kept`, of the others; `method` (`"held-out"`, or `"validation"` where the
            epoch was chosen on these pictures) and `split`, the name that came with the data;
            `train_pictures_left_out` if any were.

        Raises:
            DataError: no evaluation set, or none of its pictures is new to the residual.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise DataError(
                "There is nothing to evaluate on: pass eval_dataset; without one, measure() or cross_validate() give "
                "an honest number from the training pictures."
            )
        metrics = self._measure_held_out(dataset, include_train_pictures)
        if eval_dataset is None and not include_train_pictures:
            self.model.config.metrics = dict(metrics)
        return self._announced(metrics, metric_key_prefix)

    def cross_validate(self, folds: int = 5) -> Metrics:
        """Metrics by stratified cross-validation on the cached embeddings of the training pictures.

        Each fold is trained with the same recipe from a zero residual, on all its epochs (or up to the epoch that a
        validation set chose in `train`); the trainer's own residual stays as it is. Equal pictures are in the same
        fold. Augmentation afresh each epoch would embed everything once a fold and epoch: folds train on plain
        pictures instead.

        Args:
            folds: at least 2; fewer are made where no class has so many pictures, and classes with fewer pictures than
                folds are tested one picture at a time. A class with one picture cannot be tested.

        Returns:
            As `evaluate`, with `method` `"cross-validation"`, `folds` and `untested_classes`.

        Raises:
            DataError: nothing to train on, embeddings on disk, or no class with two pictures.
        """
        data, found = self.cross_validated_logits(folds)
        metrics = cross_validated_metrics(found, data, self.compute_metrics)
        split = split_name(self.train_dataset)
        return ShownMetrics({**metrics, "method": "cross-validation", **({"split": split} if split else {})})

    def cross_validated_logits(self, folds: int = 5) -> tuple[ImageFeatures, OutOfFold]:
        """The training pictures, and what `cross_validate` measures: logits of each by a head not trained on it.

        Args:
            folds: see `cross_validate`.

        Raises:
            DataError: see `cross_validate`.
        """
        data, plain = self._foldable()
        head = copy.deepcopy(self.model.classifier)
        if self.args.recipe == "paper":
            self._write_as_published(head)
        epochs = int((self.model.config.training or {}).get("best_epoch", 0))

        def train_fold(apart: TaskResClassifier, part: ImageFeatures) -> None:
            recipe = self._recipe(apart, part)
            if self.args.enhanced_base:
                enhance(self.model, apart, part, self.args.seed)
            fit(apart, part, recipe, self.args.seed, closed_form=self.args.closed_form, epochs=epochs)

        return data, out_of_fold(head, data, plain, folds, self.args.seed, train_fold)

    def choose_rejection(self, rate: float = 0.05, folds: int = 5) -> Rejection:
        """Choose below which score `model.rejects` takes a picture for one of no class; stored with the classifier.

        No picture of anything else is needed, nor a validation split: each training picture is compared with class
        means made without its fold. `train` does it by itself where `args.reject` is set. Training again ends it; it
        holds at every `strength`.

        Args:
            rate: share of pictures of the classes that may be rejected; with n pictures that can be held out it can
                be no less than 1 / (n + 1).
            folds: see `cross_validate`.

        Raises:
            FewShotError: too few training pictures for the rate. DataError: no class has two pictures, or embeddings
                on disk. ConfigurationError: a rate or folds out of range, or a classifier that was not trained on this
                training set.
        """
        checked_rate(rate)
        data, plain = self._foldable()
        if (self.model.config.data or {}).get("train_digest") != data.digest:
            raise ConfigurationError(
                "The threshold is chosen on the pictures that the classifier was trained on, and this one was not "
                "trained on train_dataset (with these shots and this seed): call train() first."
            )
        found = choose_rejection(plain, rate, folds, self.args.seed)
        self.model.config.rejection = found.as_dict()
        return found

    def _foldable(self) -> tuple[ImageFeatures, ImageFeatures]:
        """The training pictures as they are trained on, and plain, to test on."""
        chosen = self._training_pictures()
        if isinstance(chosen.data, StoredFeatures):
            raise DataError("Embeddings on disk are too many to cross-validate: hold some out as eval_dataset.")
        if self.args.views and chosen.images:
            return chosen.data, self._embeddings.of_pictures(chosen.images, 0)
        return chosen.data, chosen.data

    def measure(self, eval_dataset: Any = None, folds: int = 5) -> Metrics:
        """An honest number always, recorded in the model's config: on held-out pictures, else by cross-validation.

        Held out are the pictures of `eval_dataset` (by default the trainer's own) unless the epoch was chosen on them
        or the residual was trained on them.

        Returns:
            As `evaluate` or `cross_validate`, with `method` saying which it was. Empty, with a warning, where nothing
            can be measured: one picture in each class and no other.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        metrics: Metrics | None = None
        if dataset is not None and not (self.train_dataset is not None and self._chose_the_epoch(dataset)):
            try:
                metrics = self._measure_held_out(dataset, False)
            except OnlyTrainingPicturesError as error:
                if self.train_dataset is None:
                    raise
                warnings.warn(f"{error} Cross-validation takes its place.", stacklevel=2)
        if metrics is None:
            try:
                if (self.model.config.training or {}).get("continued_from"):
                    raise DataError(
                        "Cross-validation trains each fold from zero-shot, and this classifier went on from another: "
                        "hold pictures out to measure on (eval_dataset, --holdout)."
                    )
                metrics = self.cross_validate(folds)
            except DataError as error:
                if self.train_dataset is None:
                    raise
                warnings.warn(f"Nothing was measured. {error}", stacklevel=2)
                self.model.config.metrics = None
                return ShownMetrics()
        self.model.config.metrics = dict(metrics)
        return self._announced(metrics)

    def _announced(self, metrics: Metrics, prefix: str = "") -> Metrics:
        """The metrics, after a warning where training did harm, and the event."""
        if warning := loss_to_zero_shot(metrics):
            warnings.warn(warning, stacklevel=3)
        self._events("on_evaluate", metrics=prefixed(metrics, prefix or "eval"))
        return ShownMetrics(prefixed(metrics, prefix) if prefix else metrics)

    def predict(self, test_dataset: Any) -> PredictionOutput:
        """Logits [N, K], labels [N] and metrics for a labelled dataset."""
        data = self.embed(test_dataset)
        logits, _ = both_logits(self.model.classifier, data)
        metrics = own_metrics(logits, data.labels, self.compute_metrics)
        self._events("on_predict", metrics=metrics)
        return PredictionOutput(logits.numpy(), data.labels.numpy(), metrics)

    def _measure_held_out(self, dataset: Any, include_train_pictures: bool) -> Metrics:
        data, head = self.embed(dataset), self.model.classifier
        new = data if include_train_pictures or head.is_zero_shot else self._new_pictures(dataset)
        logits, zero_shot = both_logits(head, new)
        metrics = full_metrics(logits, zero_shot, new.labels, self.model.class_names, self.compute_metrics)
        metrics["method"] = "validation" if self._chose_the_epoch(dataset) else "held-out"
        if split := split_name(dataset):
            metrics["split"] = split
        if head.strength != 1.0:
            metrics["strength"] = head.strength
        metrics |= rejected_share(head, new, logits)
        if len(new) < len(data):
            metrics["train_pictures_left_out"] = len(data) - len(new)
        if conflicting := warn_of_conflicts(data, self._embeddings.names(dataset)):
            metrics["conflicting_pictures"] = conflicting
        return ShownMetrics({**metrics, "data_digest": new.digest})

    def _chose_the_epoch(self, dataset: Any) -> bool:
        """Whether the residual's epoch was chosen on these pictures, in this process or before it was saved."""
        chosen_on = (self.model.config.data or {}).get("epoch_chosen_on")
        return chosen_on is not None and self._new_pictures(dataset).digest == chosen_on

    def _new_pictures(self, dataset: Any) -> ImageFeatures:
        return without_training_pictures(self.model.config.data, self.embed(dataset), self._embeddings.names(dataset))

    # ------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Save the artifact to `output_dir` (default: the run's own)."""
        self.model.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, **kwargs: Any) -> Any:
        """Upload the artifact to `hub_model_id` (default: the name of `output_dir`)."""
        options = {"token": self.args.token, "private": self.args.hub_private_repo, **kwargs}
        return self.model.push_to_hub(self.args.hub_model_id or Path(self.args.output_dir).name, **options)

    def _record(self, recipe: Recipe, chosen: TrainingPictures) -> None:
        """Provenance in the config: what `taskres info` and the card show."""
        config, data = self.model.config, chosen.data
        values = asdict(recipe)
        values["recipe"] = values.pop("name")
        config.training = {
            **values, "seed": self.args.seed, "views": self.args.views, "augment_online": chosen.online,
            "underscores": config.underscores,
            "engine": None if chosen.images is None else self.embedder.engine.name,
        }  # fmt: skip
        config.few_shot = chosen.few_shot
        config.data = {"train_digest": data.digest, "train_images": len(data)}
        if isinstance(data, ImageFeatures) and data.digests:
            config.data["train_pictures"] = remember(data.digests)
        if chosen.conflicting:
            config.data["conflicting_pictures"] = chosen.conflicting
        if split := split_name(self.train_dataset):
            config.data["split"] = split
        account = getattr(self.train_dataset, "account", None)
        if account is not None:
            config.data["account"] = account.as_dict()
        if self.args.dataset_name:
            config.data |= {"id": self.args.dataset_name, "name": self.args.dataset_name}
        config.metrics = config.rejection = None  # they spoke of the residual before this run

    # ------------------------------------------------------------------ data

    def embed(self, dataset: Any, views: int = 0) -> ImageFeatures:
        """Embeddings of a dataset with the model's classes, which other trainers of the same model can train on.

        Args:
            dataset: as for `train_dataset`. views: 0 for the plain picture, V for V augmented views.
        """
        return self._embeddings.of(dataset, views)

    @property
    def embedder(self) -> Embedder:
        """Base, processor and engine; made when first needed."""
        return self._embeddings.embedder

    def training_embeddings(self) -> ImageFeatures:
        """Embeddings [V, N, D] of the pictures that `train` would learn from: drawn, readable, in memory.

        Raises:
            DataError: no training data. FewShotError: a class without any picture.
        """
        data = at_once(self._training_pictures()).data
        assert isinstance(data, ImageFeatures)
        return data

    def _training_pictures(self) -> TrainingPictures:
        """The drawn pictures and their embeddings; drawn once for one dataset, draw and order of classes."""
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise DataError("There is nothing to train on: pass train_dataset to TaskResTrainer.")
        key = (id(dataset), args.shots, args.seed, args.views, args.augment_online, args.recipe, args.on_short)
        if self._chosen is None or self._chosen[0] != key or self._chosen[1].data.class_names != self.model.class_names:
            chosen = training_pictures(
                self._embeddings.source(dataset), args, self.model.class_names, self._embeddings.of_pictures,
                lambda: self.model.image_processor,
            )  # fmt: skip
            self._chosen = (key, chosen)
        return self._chosen[1]
