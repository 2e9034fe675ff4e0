"""What a `TaskResTrainer` measures: on held-out pictures, by cross-validation, or whichever of them is honest."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PredictionOutput

from ..embedding import ImageFeatures, StoredFeatures
from ..errors import ConfigurationError, DataError
from ..evaluation import loss_to_zero_shot
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..notebook import ShownMetrics
from ..rejection import Rejection, checked_rate
from ..residual import TaskResClassifier, label_threshold
from .arguments import TaskResTrainingArguments
from .callbacks import Events
from .enhanced_base import enhance
from .measuring import (
    ComputeMetrics,
    Metrics,
    OnlyTrainingPicturesError,
    OutOfFold,
    both_logits,
    choose_rejection,
    cross_validated_metrics,
    full_metrics,
    out_of_fold,
    own_metrics,
    prefixed,
    rejected_share,
    split_name,
    warn_of_conflicts,
    without_training_pictures,
)
from .recipes import Recipe
from .shots import DatasetEmbeddings, TrainingPictures
from .steps import fit


class MeasuresClassifiers:
    """The measurements of `TaskResTrainer`, which has the attributes named here."""

    model: TaskResCLIPForImageClassification
    args: TaskResTrainingArguments
    train_dataset: Any
    eval_dataset: Any
    compute_metrics: ComputeMetrics | None
    _events: Events
    _embeddings: DatasetEmbeddings

    if TYPE_CHECKING:

        def embed(self, dataset: Any, views: int = 0) -> ImageFeatures: ...
        def _training_pictures(self) -> TrainingPictures: ...
        def _recipe(self, head: TaskResClassifier, data: ImageFeatures | StoredFeatures) -> Recipe: ...
        def _write_as_published(self, head: TaskResClassifier) -> None: ...

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
            `per_class`, shares from 0 to 1, or of several labels per picture what `evaluation.compare_multi_label`
            gives; where a threshold was chosen, `rejected`, the share of these pictures that `model.rejects`, and
            `accuracy_of_kept`, of the others; `method` (`"held-out"`, or `"validation"` where the epoch was chosen on
            these pictures) and `split`, the name that came with the data; `train_pictures_left_out` if any were.

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
        return ShownMetrics(
            {**metrics, **_of_texts(data), "method": "cross-validation", **({"split": split} if split else {})}
        )

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
                on disk. ConfigurationError: a rate or folds out of range, a classifier that was not trained on this
                training set, or one of several labels per picture.
        """
        checked_rate(rate)
        self.model.classifier.check_one_label("Rejection of pictures of no class")
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
        config = self.model.config
        noun = "picture" if config.text_encoding is None else "text"
        if warning := loss_to_zero_shot(metrics, config.base_classifier, noun):
            warnings.warn(warning, stacklevel=3)
        self._events("on_evaluate", metrics=prefixed(metrics, prefix or "eval"))
        return ShownMetrics(prefixed(metrics, prefix) if prefix else metrics)

    def predict(self, test_dataset: Any) -> PredictionOutput:
        """Logits [N, K], labels [N] and metrics for a labelled dataset."""
        data = self.embed(test_dataset)
        logits, _ = both_logits(self.model.classifier, data)
        metrics = own_metrics(logits, data.labels, self.compute_metrics, label_threshold(self.model.classifier.facts))
        self._events("on_predict", metrics=metrics)
        return PredictionOutput(logits.numpy(), data.labels.numpy(), metrics)

    def _measure_held_out(self, dataset: Any, include_train_pictures: bool) -> Metrics:
        data, head = self.embed(dataset), self.model.classifier
        new = data if include_train_pictures or head.is_zero_shot else self._new_pictures(dataset)
        logits, zero_shot = both_logits(head, new)
        metrics = full_metrics(
            logits, zero_shot, new.labels, self.model.class_names, self.compute_metrics, label_threshold(head.facts)
        )
        metrics |= _of_texts(data)
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


def _of_texts(data: ImageFeatures) -> Metrics:
    """What metrics say of what was measured on, where it is no pictures."""
    return {} if data.noun == "picture" else {"noun": data.noun}
