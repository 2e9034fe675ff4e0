"""`TaskResTrainingArguments`: the settings of a training run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import ConfigurationError


@dataclass
class TaskResTrainingArguments:
    """Settings of a training run; None means the recipe's own value.

    Args:
        output_dir: where checkpoints go.
        recipe: `"auto"` (one setting for every task) or `"paper"` (as published).
        shots: training pictures per class to draw; None takes all.
        seed: seed of the draw, of the views and of the order of batches.
        on_short: a class with fewer pictures than `shots`: `"warn"` and take all it has, `"raise"`, or `"ignore"`.
        num_train_epochs, learning_rate, weight_decay, warmup_lr, train_batch_size, penalty: override the recipe;
            `train_batch_size` counts examples per step over all processes.
        views: augmented views cached per picture; 0 trains on the plain picture.
        enhanced_base: tune the text projection on the few-shot data first (TaskRes*), then the residual on that base.
        augment_online: augment and embed afresh every epoch, as published, instead of caching.
        embed_batch_size: pictures a forward pass of the frozen tower, by default the engine's best.
        engine, precision: how the tower runs, see `engines`; `"auto"` takes what the machine has, and fp32 in torch for
            recipe `"paper"`. Recorded in the artifact.
        exact_preprocessing: use the stock image processor, not the faster one that agrees to two grey levels.
        draft_decoding: decode large JPEG pictures coarsely, see `features.Embedder`.
        cache_dir: folder of cached embeddings; None for `$TASKRES_CACHE` or the Hugging Face cache, `False` for
            none.
        buffer_mb: megabytes of embeddings held in memory when training from `features.StoredFeatures`.
        save_epochs: write a checkpoint every so many epochs; 0 never.
        save_total_limit: checkpoints kept.
        early_stopping_patience: stop after so many epochs without a better accuracy on the evaluation set and keep
            the best residual; None (default) never stops early. Give a validation split then, not the test split.
        label_map: dataset class name to model class name where they differ, or `"position"`.
        image_column, label_column, drop_unlabelled, on_error: how datasets are read, see `data.LabelledImages` and
            `features.embed_images`.
        closed_form: use the gradient by hand where one process trains on cached embeddings.
        report_to: trackers for Accelerate's `log_with`, such as `"tensorboard"`; none by default.
        dataset_name: recorded in the artifact.
        use_cpu, disable_tqdm, push_to_hub, hub_model_id, hub_token, hub_private_repo: as in
            `transformers.TrainingArguments`.

    Raises:
        ConfigurationError: a value out of range.
    """

    output_dir: str = "taskres-output"
    recipe: str = "auto"
    shots: int | None = None
    seed: int = 1
    on_short: str = "warn"
    num_train_epochs: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_lr: float | None = None
    train_batch_size: int | None = None
    penalty: float | None = None
    views: int = 0
    enhanced_base: bool = False
    augment_online: bool = False
    embed_batch_size: int | None = None
    engine: str = "auto"
    precision: str = "auto"
    exact_preprocessing: bool = False
    draft_decoding: bool = False
    cache_dir: str | bool | None = None
    buffer_mb: int = 64
    save_epochs: int = 0
    save_total_limit: int | None = None
    early_stopping_patience: int | None = None
    label_map: Mapping[str, str] | str | None = None
    image_column: str | None = None
    label_column: str | None = None
    drop_unlabelled: bool = False
    on_error: str = "raise"
    closed_form: bool = True
    report_to: str | list[str] | None = None
    dataset_name: str | None = None
    use_cpu: bool = False
    disable_tqdm: bool | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = field(default=None, repr=False)
    hub_private_repo: bool | None = None

    def __post_init__(self) -> None:
        problems = []
        for name in (
            "shots",
            "num_train_epochs",
            "train_batch_size",
            "buffer_mb",
            "embed_batch_size",
            "early_stopping_patience",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                problems.append(f"`{name}` must be a whole number of at least 1; got {value!r}")
        for name in ("views", "save_epochs"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                problems.append(f"`{name}` must be a whole number of at least 0; got {getattr(self, name)!r}")
        for name in ("learning_rate", "weight_decay", "warmup_lr", "penalty"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                problems.append(f"`{name}` must be a finite number of at least 0; got {value!r}")
        if self.recipe not in ("auto", "paper"):
            problems.append(f"`recipe` must be 'auto' or 'paper'; got {self.recipe!r}")
        if self.augment_online and self.views:
            problems.append("choose either `views` (cached) or `augment_online` (afresh each epoch)")
        if problems:
            raise ConfigurationError("; ".join(problems) + ".")
        if self.disable_tqdm is None:
            self.disable_tqdm = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {
                "1",
                "ON",
                "YES",
                "TRUE",
            }
