"""`TaskResTrainer`: frozen embeddings once, then epochs over them; and an honest number for the outcome."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data import LabelledImages
from ..embedding import Embedder, ImageFeatures, StoredFeatures, TextEmbedder
from ..errors import ConfigurationError, DataError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..residual import TaskResClassifier
from .arguments import TaskResTrainingArguments
from .callbacks import EpochBar, EpochFlow, Events, Trackers
from .enhanced_base import EPOCHS, enhance, published_base
from .evaluating import MeasuresClassifiers
from .measuring import (
    ComputeMetrics,
    Metrics,
    check_rejectable,
    epoch_metrics,
    goes_on_from,
    remember,
    remember_start,
    split_name,
)
from .recipes import Recipe, check_supported, published_alpha, recipe_for, why_epochs
from .run import TrainingRun, check_epoch_choice, describe_run
from .shots import DatasetEmbeddings, TrainingPictures, at_once, training_pictures
from .steps import (
    Batches,
    batches_augmented,
    batches_from_disk,
    batches_in_memory,
    batches_whole,
    make_step,
    start_by_epochs,
)

logger = logging.get_logger(__name__)


class TaskResTrainer(MeasuresClassifiers):
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
        check_supported(self.model.classifier, self.args)
        chosen, held_out = self._training_pictures(), None
        head = self.model.classifier
        if self.args.reject is not None:
            head.check_one_label("Rejection of pictures of no class (reject)")
            check_rejectable(self._foldable()[1], self.args.reject, self.args.seed)
        if self.args.recipe == "paper":
            self._write_as_published(head)
        recipe = self._recipe(head, chosen.data)
        before = goes_on_from(self.model.config, head, recipe.name, chosen.data.digest)
        if recipe.name != "auto":
            if (self.model.config.training or {}).get("recipe") == "auto":
                head.reset()  # epochs cannot go on from what was fitted at once
            head.check_trainable()
            start_by_epochs(head, chosen.data)
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
            embedder: Any = self.embedder  # of pictures: texts are not augmented
            return batches_augmented(chosen.images, digests, embedder, head, recipe, args.seed, turn, *share)
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
        if (asked := getattr(self.train_dataset, "asked", None)) is not None:
            config.data["labels"] = asked.as_dict()
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
    def embedder(self) -> Embedder | TextEmbedder:
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
