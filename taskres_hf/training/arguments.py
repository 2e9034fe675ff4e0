"""`TaskResTrainingArguments`: the settings of a training run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    CacheDir = str | Literal[False] | None
else:
    CacheDir = str | None  # HfArgumentParser knows no more
RecipeName = Literal["auto", "auto-v1", "paper"]
OnShort = Literal["warn", "raise", "ignore"]
OnError = Literal["raise", "skip"]
EngineName = Literal["auto", "torch", "openvino", "onnxruntime"]
PrecisionName = Literal["auto", "fp32", "bf16", "int8"]
Crop = Literal["processor", "torchvision"]
EvalStrategy = Literal["no", "epoch"]

_CHOICES: dict[str, Any] = {
    "recipe": RecipeName, "on_short": OnShort, "on_error": OnError, "engine": EngineName, "precision": PrecisionName,
    "crop": Crop, "eval_strategy": EvalStrategy,
}  # fmt: skip
_AT_LEAST_ONE = (
    "shots", "num_train_epochs", "train_batch_size", "buffer_mb", "embed_batch_size", "early_stopping_patience",
)  # fmt: skip
_TRUTH_VALUES: dict[str, tuple[bool | None, ...]] = {
    **dict.fromkeys(
        (
            "enhanced_base", "exact_preprocessing", "draft_decoding", "load_best_model_at_end", "drop_unlabelled",
            "closed_form", "use_cpu", "push_to_hub",
        ),
        (True, False),
    ),
    **dict.fromkeys(("augment_online", "greater_is_better", "disable_tqdm", "hub_private_repo"), (True, False, None)),
}  # fmt: skip
_MASK = "<HUB_TOKEN>"


class _MaskedToken(str):
    """Reads as a mask wherever it is printed, copied or stored; only `value` holds the token."""

    value: str

    def __new__(cls, value: str) -> _MaskedToken:
        token = super().__new__(cls, _MASK)
        token.value = value
        return token

    def __reduce__(self) -> Any:
        return str, (_MASK,)


@dataclass
class TaskResTrainingArguments:
    """Settings of a training run; None means the recipe's own value.

    `transformers.HfArgumentParser(TaskResTrainingArguments)` makes them command-line options.

    Args:
        output_dir: where checkpoints go.
        recipe: `"auto"` (fits all at once, nothing to set; anything below that asks for epochs makes it `"auto-v1"`),
            `"auto-v1"` (trained by epochs, one setting for every task) or `"paper"` (as published: besides the numbers,
            pictures augmented afresh each epoch, underscores of class names kept in prompts, fp32, and the constants of
            the dataset that `dataset_name` names; see the documentation on recipes).
        shots: training pictures per class to draw; None takes all.
        seed: seed of the draw, of the views and of the order of batches.
        on_short: a class with fewer pictures than `shots`: `"warn"` and take all it has, `"raise"`, or `"ignore"`.
        num_train_epochs, learning_rate, weight_decay, warmup_lr, train_batch_size, penalty: override the recipe,
            and any of them makes `"auto"` `"auto-v1"`; `train_batch_size` counts examples per step over all processes.
        views: augmented views cached per picture; 0 trains on the plain picture.
        enhanced_base: tune the text projection on the few-shot data first (TaskRes*), then the residual on that base.
        augment_online: augment and embed afresh every epoch, as published, instead of caching; None leaves it to the
            recipe: `"paper"` does where it has pictures and no `views`, the others do not.
        embed_batch_size: pictures a forward pass of the frozen tower, by default the engine's best.
        engine, precision: how the tower runs, see `embedding.engines`; `"auto"` takes what the machine has, and fp32 in
            torch for recipe `"paper"`. Recorded in the artifact.
        exact_preprocessing: use the stock image processor, not the faster one that agrees to two grey levels.
        draft_decoding: decode large JPEG pictures coarsely, see `embedding.embedder.Embedder`.
        crop: centre crop as the image `"processor"` rounds it, or as `"torchvision"` does, one pixel off at some sizes.
        cache_dir: folder of cached embeddings; None for `$TASKRES_CACHE` or the Hugging Face cache, `False` for
            none.
        buffer_mb: megabytes of embeddings held in memory when training from `StoredFeatures`.
        save_epochs: write a checkpoint every so many epochs; 0 never.
        save_total_limit: checkpoints kept; None, 0 or less for no limit, as in transformers.
        eval_strategy: `"epoch"` measures on the evaluation set after every epoch; `"no"` (default) does not.
        load_best_model_at_end: keep the residual of the best epoch on the evaluation set.
        metric_for_best_model, greater_is_better: what best means; more is better unless the name ends in `loss`. Of
            several labels per picture, `accuracy` means `map`.
        early_stopping_patience: stop after so many epochs without a better `metric_for_best_model` and keep the best
            residual; None (default) never stops early. Give a validation split: a split called test is refused.
        reject: also choose below which score a picture counts as one of no class, so that at most this share of
            pictures of the classes does, such as 0.05 (`TaskResTrainer.choose_rejection`); None chooses nothing.
        label_map: dataset class name to model class name where they differ (also as JSON), or `"position"`.
        image_column, text_column, label_column, drop_unlabelled, on_error: how datasets are read, see
            `data.labelled.LabelledImages`, `data.texts.LabelledTexts` and `embedding.features.embed_images`.
        closed_form: use the gradient by hand where one process trains.
        report_to: trackers for Accelerate's `log_with`, such as `"tensorboard"`; `"all"` that are installed; `"none"`,
            None or `[]` (default) for none.
        dataset_name: recorded in the artifact.
        use_cpu, disable_tqdm, push_to_hub, hub_model_id, hub_token, hub_private_repo: as in
            `transformers.TrainingArguments`. The token reads as a mask; copies and pickles do not carry it.

    Raises:
        ConfigurationError: a value out of range. MissingExtraError: a tracker's package is not installed.
    """

    output_dir: str = "taskres-output"
    recipe: RecipeName = "auto"
    shots: int | None = None
    seed: int = 1
    on_short: OnShort = "warn"
    num_train_epochs: int | None = None
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_lr: float | None = None
    train_batch_size: int | None = None
    penalty: float | None = None
    views: int = 0
    enhanced_base: bool = False
    augment_online: bool | None = None
    embed_batch_size: int | None = None
    engine: EngineName = "auto"
    precision: PrecisionName = "auto"
    exact_preprocessing: bool = False
    draft_decoding: bool = False
    crop: Crop = "processor"
    cache_dir: CacheDir = None
    buffer_mb: int = 64
    save_epochs: int = 0
    save_total_limit: int | None = None
    eval_strategy: EvalStrategy = "no"
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "accuracy"
    greater_is_better: bool | None = None
    early_stopping_patience: int | None = None
    reject: float | None = None
    label_map: Mapping[str, str] | str | None = None
    image_column: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    drop_unlabelled: bool = False
    on_error: OnError = "raise"
    closed_form: bool = True
    report_to: None | str | list[str] = None  # noqa: RUF036 (HfArgumentParser takes the second of them)
    dataset_name: str | None = None
    use_cpu: bool = False
    disable_tqdm: bool | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_token: str | None = field(default=None, repr=False)
    hub_private_repo: bool | None = None

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ConfigurationError("; ".join(problems) + ".")
        self.label_map = _label_map(self.label_map)
        self.report_to = _trackers(self.report_to)
        if self.keeps_best:
            self.eval_strategy = "epoch"  # what chooses an epoch looks at each, as callbacks of transformers check
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        if self.hub_token is not None and not isinstance(self.hub_token, _MaskedToken):
            self.hub_token = None if self.hub_token == _MASK else _MaskedToken(self.hub_token)
        if self.disable_tqdm is None:
            quiet = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "")
            self.disable_tqdm = quiet.upper() in {"1", "ON", "YES", "TRUE"}

    def _problems(self) -> list[str]:
        problems = []
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and (not _whole(value) or value < 1):
                problems.append(f"`{name}` must be a whole number of at least 1; got {value!r}")
        for name in ("views", "save_epochs"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 0:
                problems.append(f"`{name}` must be a whole number of at least 0; got {getattr(self, name)!r}")
        if self.save_total_limit is not None and not _whole(self.save_total_limit):
            problems.append(f"`save_total_limit` must be a whole number; got {self.save_total_limit!r}")
        if not _whole(self.seed) or not 0 <= self.seed < 2**32:  # what NumPy and scikit-learn take
            problems.append(f"`seed` must be a whole number from 0 to 4294967295; got {self.seed!r}")
        for name, kinds in _TRUTH_VALUES.items():
            if not any(getattr(self, name) is value for value in kinds):
                problems.append(f"`{name}` must be {' or '.join(map(str, kinds))}; got {getattr(self, name)!r}")
        metric: Any = self.metric_for_best_model
        if not isinstance(metric, str):
            problems.append(f"`metric_for_best_model` must be a name; got {metric!r}")
        for name in ("learning_rate", "weight_decay", "warmup_lr", "penalty"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value) and value >= 0):
                problems.append(f"`{name}` must be a finite number of at least 0; got {value!r}")
        reject = self.reject
        if reject is not None and (isinstance(reject, bool) or not isinstance(reject, float) or not 0.0 < reject < 1.0):
            problems.append(f"`reject` must be a share above 0 and below 1, such as 0.05; got {reject!r}")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                *most, last = map(repr, get_args(kind))
                problems.append(f"`{name}` must be {', '.join(most)} or {last}; got {getattr(self, name)!r}")
        if self.augment_online and self.views:
            problems.append("choose either `views` (cached) or `augment_online` (afresh each epoch)")
        return problems

    @property
    def keeps_best(self) -> bool:
        """Whether the evaluation set chooses the epoch."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def evaluates_epochs(self) -> bool:
        """Whether every epoch ends with a measurement."""
        return self.eval_strategy == "epoch" or self.keeps_best

    @property
    def token(self) -> str | None:
        """The token itself, for the Hub's client alone."""
        return getattr(self.hub_token, "value", None if self.hub_token == _MASK else self.hub_token)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them, the token masked."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["hub_token"] = None if self.hub_token is None else _MASK
        values["label_map"] = dict(self.label_map) if isinstance(self.label_map, Mapping) else self.label_map
        values["report_to"] = [str(name) for name in self.report_to or []]
        values["output_dir"] = str(self.output_dir)
        return values

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """`to_dict` with everything but numbers and truth values as text, for trackers."""
        return {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in self.to_dict().items()
        }


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _label_map(given: Any) -> dict[str, str] | str | None:
    if given is None or given == "position":
        return None if given is None else "position"
    parsed = given
    if isinstance(given, str):
        try:
            parsed = json.loads(given)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"`label_map` is neither 'position' nor JSON: {error}.") from error
    if not isinstance(parsed, Mapping) or not all(isinstance(value, str) for value in parsed.values()):
        raise ConfigurationError(f"`label_map` must give a class name for a class name; got {str(given)[:200]}.")
    return {str(key): value for key, value in parsed.items()}


def _trackers(report_to: Any) -> list[Any]:
    """The trackers to report to, each of them installed."""
    if report_to is not None and not isinstance(report_to, (str, list, tuple)):
        raise ConfigurationError(f"`report_to` must be a tracker's name or a list of them; got {report_to!r}.")
    names = [] if report_to is None else [report_to] if isinstance(report_to, str) else list(report_to)
    if not names or names == ["none"]:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = sorted(map(str, LOGGER_TYPE_TO_CLASS)), sorted(map(str, get_available_trackers()))
    if names == ["all"]:
        return available
    for name in names:
        if isinstance(name, str) and name not in known:
            raise ConfigurationError(f"`report_to` must be 'none', 'all' or among {known}; got {name!r}.")
        if isinstance(name, str) and name not in available:
            package = name.replace("_", "-")
            raise MissingExtraError(
                f"report_to={name!r} needs the package {package}, which is not installed: pip install {package}. "
                "Or train with report_to='none'."
            )
    return names


def is_test_split(split: str | None) -> bool:
    """Whether a split's name says that it is for the final measurement, such as `test` or `test[:50%]`."""
    parts = [part.split("[")[0].strip().lower() for part in (split or "").split("+")]
    return any(part.startswith("test") for part in parts)


def recorded_arguments(config: Mapping[str, Any], **changes: Any) -> TaskResTrainingArguments:
    """The settings that a saved classifier was trained with, to train on the same pictures again.

    Args:
        config: `config.json` of the classifier. changes: settings to have another way.
    """
    training, few_shot = config.get("training") or {}, config.get("few_shot") or {}
    names = {entry.name for entry in fields(TaskResTrainingArguments)}
    values = {key: value for key, value in training.items() if key in names and value is not None}
    if training.get("recipe") == "auto":  # it has no settings; those of epochs would make another recipe of it
        values = {"recipe": "auto"}
    seed = few_shot.get("seed")  # of the draw, which may be 0; 1 where none is recorded
    values |= {"shots": few_shot.get("shots"), "seed": 1 if seed is None else int(seed)}
    values["enhanced_base"] = config.get("enhanced_base") is not None
    return TaskResTrainingArguments(**{**values, **changes})
