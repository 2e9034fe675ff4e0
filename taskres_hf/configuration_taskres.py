"""`TaskResConfig`: what an artifact needs to know besides the residual."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from .artifact import ALONE_VERSION, FORMAT_VERSION, HEAD_VERSION, PLAIN_VERSION, library_versions
from .errors import ConfigurationError
from .prompts import DEFAULT_TEMPLATE, check_class_names, class_prompts, resolve_templates, sentences_by_class
from .residual import AS_PUBLISHED, MULTI_LABEL, checked_alpha, setting

# How a residual came to be. Each has one writer: the trainer, or an import.
RECORDED = ("few_shot", "training", "metrics", "data", "enhanced_base", "rejection")

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
BASE_KWARGS = ("device_map", "attn_implementation", "max_memory", "offload_folder", "quantization_config")
# Truthy, these too mean nothing to a single small safetensors file; anything else must be None or False.
_IGNORED_KWARGS = {
    "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors",
    "weights_only", "code_revision", "trust_remote_code", "offload_state_dict",
}  # fmt: skip
_SETTABLE = ("alpha", "strength", "return_dict")  # values of the config that `from_pretrained` takes
# Which code runs is never decided by a file.
_NEVER_READ = {
    "attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation",
    "quantization_config",
}  # fmt: skip
# What makes the classifier, which a config given beside the artifact must agree on.
_FIXED = (
    "base_model_name_or_path", "base_model_revision", "projection_dim", "id2label", "templates", "class_descriptions",
    "prompt_names", "underscores", "prompt_average", "residual_side", "logit_scale", "logit_bias", "base_fingerprint",
    "normalize_weight", "logit_scale_factor", "problem_type", "base_classifier",
    "text_encoding",
)  # fmt: skip


# What transformers' configs have and nothing here obeys; in one given beside the artifact it must be as usual.
_UNUSED = ("label2id", "output_hidden_states", "output_attentions")


def _recorded(key: str) -> Any:
    """A property over one entry of `facts`; None where there is none."""

    def read(config: TaskResConfig) -> Any:
        return config.facts.get(key)

    def write(config: TaskResConfig, value: Any) -> None:
        if value is None:
            config.facts.pop(key, None)
        else:
            config.facts[key] = value

    return property(read, write)


class TaskResConfig(PreTrainedConfig):
    """Configuration of a `TaskResCLIPForImageClassification`.

    `id2label` and `label2id` are the only home of the classes; `class_names` reads them in label order.

    Args:
        base_model_name_or_path: Hub id or folder of the frozen dual encoder.
        base_model_revision: commit of the base on the Hub the residual was trained on; None for a folder.
        base_model_subfolder: folder of the base inside its repository, or None.
        base_model_type: `model_type` of the base, such as `"clip"`.
        projection_dim: D, the length of an embedding.
        templates: prompt templates, each with one `{}`; empty when descriptions alone make the prompts.
        class_descriptions: sentences per class used as prompts (CuPL), or None; a string is one sentence.
        prompt_names: what stands in a prompt instead of a class name, or None.
        underscores: `"replace"` or `"keep"`, see `prompts.class_prompts`.
        prompt_average: `"raw"` (published) or `"normalized"`, see `base_classifier.base_embeddings`.
        alpha: scale of the residual (paper: 0.5).
        residual_side: `"text"` (published) or `"image"` (one shared residual on image embeddings).
        enhanced_base: how the base's shift was made (TaskRes*), or None for the regular base.
        logit_scale: factor on the cosine, exponentiated; logit_bias: constant on every logit.
        strength, normalize_weight, logit_scale_factor: see `TaskResClassifier`.
        base_fingerprint: what the base classifier was made from, checked on loading.
        few_shot: the draw: `shots`, `seed`, `num_images`, `indices`.
        training: the run: recipe, its numbers, `seed`, `engine`.
        metrics: the last measurement: what `evaluate` returns, with `split` and `data_digest`.
        data: where the pictures came from: `id`, `name`, `train_digest`, `train_images`, `train_pictures`, `account`.
            These four and `enhanced_base` are shown by `taskres info` and the card; `classifier.reset()` empties them.
        rejection: below which score a picture counts as one of no class (`rejection.Rejection`), or None.
        library_versions: versions of the packages that wrote the artifact.
        residual_sha256: checksum of the residual's bytes (integrity, not authenticity).
        processor_sha256: checksum of preprocessor_config.json; None where the artifact has none.
        format_version: version of the artifact's layout.
        base_classifier: None over a dual encoder. Over an image tower alone `"head"`, whose labels the prompts then
            are, or `"class_means"`, see `TaskResForImageClassification`. Of texts one of these or `"class_names"`.
        text_encoding: of a classifier of texts, how one becomes an embedding (`language.encoding.TextEncoding`); else
            None.
        problem_type: `"multi_label_classification"` where a picture may have several labels, or none; else one.

    Raises:
        ConfigurationError: a value of the wrong type or range.
    """

    model_type = "taskres"

    def __init__(
        self,
        base_model_name_or_path: str | None = None,
        base_model_revision: str | None = None,
        base_model_subfolder: str | None = None,
        base_model_type: str | None = None,
        projection_dim: int | None = None,
        templates: list[str] | None = None,
        class_descriptions: Mapping[str, Sequence[str] | str] | None = None,
        prompt_names: dict[str, str] | None = None,
        underscores: str = "replace",
        prompt_average: str = "raw",
        alpha: float = 0.5,
        residual_side: str = "text",
        enhanced_base: dict[str, Any] | None = None,
        logit_scale: float | None = None,
        logit_bias: float = 0.0,
        base_fingerprint: dict[str, Any] | None = None,
        few_shot: dict[str, Any] | None = None,
        training: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        library_versions: dict[str, str] | None = None,
        rejection: dict[str, Any] | None = None,
        residual_sha256: str | None = None,
        processor_sha256: str | None = None,
        strength: float = 1.0,
        normalize_weight: bool = True,
        logit_scale_factor: float = 1.0,
        format_version: int = PLAIN_VERSION,
        base_classifier: str | None = None,
        text_encoding: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        recorded = dict(zip(RECORDED, (few_shot, training, metrics, data, enhanced_base, rejection), strict=True))
        # Shared with the head of a model (`TaskResClassifier.facts`): one home for each fact.
        self.facts: dict[str, Any] = {"alpha": checked_alpha(alpha)}
        self.facts.update({key: value for key, value in recorded.items() if value is not None})
        self.strength, self.normalize_weight = strength, normalize_weight
        self.logit_scale_factor = logit_scale_factor
        self.base_model_name_or_path = base_model_name_or_path
        self.base_model_revision = base_model_revision
        self.base_model_subfolder = base_model_subfolder
        self.base_model_type = base_model_type
        self.projection_dim = projection_dim
        self.templates = [DEFAULT_TEMPLATE] if templates is None else list(templates)
        self.class_descriptions = sentences_by_class(class_descriptions)
        self.prompt_names = prompt_names
        self.underscores, self.prompt_average = underscores, prompt_average
        self.residual_side = residual_side
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.base_fingerprint = base_fingerprint
        self.library_versions = library_versions
        self.residual_sha256 = residual_sha256
        self.processor_sha256 = processor_sha256
        self.format_version, self.base_classifier = format_version, base_classifier
        self.text_encoding = text_encoding
        super().__init__(**kwargs)
        self.architectures = self.architectures or []  # by which transformers chooses between our two classes

    @classmethod
    def for_classes(
        cls,
        class_names: Any,
        templates: str | Sequence[str] | None = None,
        *,
        class_descriptions: Mapping[str, Sequence[str] | str] | None = None,
        prompt_names: Mapping[str, str] | None = None,
        **values: Any,
    ) -> TaskResConfig:
        """The config of a new classifier; what is said of its base is filled in once that is loaded.

        Args:
            class_names: K names in label order, or a `datasets.ClassLabel`.
            templates, class_descriptions, prompt_names: see `TaskResCLIPForImageClassification.from_base`.
            **values: as in the constructor.

        Raises:
            ClassNamesError, ConfigurationError: names, templates or descriptions of the wrong form; `class_prompts`
                checks the rest.
        """
        names = check_class_names(class_names)
        if values.get("problem_type") not in (None, "single_label_classification", MULTI_LABEL):
            raise ConfigurationError(
                f"`problem_type` must be 'single_label_classification' or '{MULTI_LABEL}'; got "
                f"{values['problem_type']!r}."
            )
        if templates is not None or class_descriptions is None:
            templates = resolve_templates(templates)
        return cls(
            templates=list(templates or []),
            class_descriptions=class_descriptions,
            prompt_names=dict(prompt_names) or None if isinstance(prompt_names, Mapping) else prompt_names,
            id2label=dict(enumerate(names)),
            label2id={label: index for index, label in enumerate(names)},
            **values,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ConfigurationError: a value is not what it must be, as in a config.json edited by hand.
        """
        methods = [key for key in config_dict if key == "facts" or callable(getattr(cls, str(key), None))]
        if methods:
            raise ConfigurationError(f"The config.json is damaged: it may not hold {', '.join(methods)}.")
        try:
            plain = {key: value for key, value in config_dict.items() if key not in _NEVER_READ}
            # Without more to set, all that transformers adds is to write the config into its log.
            result = super().from_dict(plain, **kwargs) if kwargs else cls(**plain)
            config = result[0] if isinstance(result, tuple) else result
            # What the file says; whatever differs from it later was set on purpose.
            config._as_read = {key: config_dict[key] for key in _SETTABLE if key in config_dict}
            return result
        except ConfigurationError:
            raise
        except Exception as error:  # whatever transformers makes of a value that is not as it must be
            raise ConfigurationError(
                f"The config.json is damaged ({type(error).__name__}: {error}). Save the artifact again, or download "
                "it again."
            ) from error

    @property
    def alpha(self) -> float:
        """Scale of the residual."""
        return float(self.facts["alpha"])

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.facts["alpha"] = checked_alpha(value)

    strength = setting("strength")
    normalize_weight = setting("normalize_weight")
    logit_scale_factor = setting("logit_scale_factor")
    few_shot = _recorded("few_shot")
    training = _recorded("training")
    metrics = _recorded("metrics")
    data = _recorded("data")
    enhanced_base = _recorded("enhanced_base")
    rejection = _recorded("rejection")

    def to_dict(self) -> dict[str, Any]:
        """Everything that goes into config.json."""
        values: dict[str, Any] = super().to_dict()
        facts = values.pop("facts", {})
        values.pop("_as_read", None)
        head = {key: facts.get(key, published) for key, published in AS_PUBLISHED.items()}
        return {
            **values, "alpha": facts.get("alpha", self.alpha), **head, **{key: facts.get(key) for key in RECORDED},
        }  # fmt: skip

    def to_save(
        self, base_name: str | None, enhanced: bool, biased: bool, auto_map: dict[str, str] | None
    ) -> dict[str, Any]:
        """The content of an artifact's config.json, without the checksum.

        Args:
            base_name: what to call the base. enhanced, biased: whether a shift or a class bias is saved beside the
                residual.
            auto_map: the classes for `trust_remote_code`, where their module is saved too.
        """
        plain = {key for key in AS_PUBLISHED if key not in self.facts}
        newest = biased or plain != set(AS_PUBLISHED) or self.problem_type == MULTI_LABEL
        self.library_versions, self.format_version = library_versions(), HEAD_VERSION if newest else PLAIN_VERSION
        if self.base_classifier is not None:
            self.format_version = ALONE_VERSION if self.text_encoding is None else FORMAT_VERSION
        values = {**self.to_diff_dict(), "base_model_name_or_path": base_name, "alpha": self.alpha}
        values["id2label"] = {str(key): value for key, value in (self.id2label or {}).items()}
        dtype = str(self.dtype).removeprefix("torch.")
        values["dtype"] = dtype if dtype in ("bfloat16", "float16") else "float32"  # no base is loaded in another
        dropped = {"auto_map", *plain} | (set() if enhanced else {"enhanced_base"})
        dropped |= {key for key in ("rejection", "base_classifier", "text_encoding") if not getattr(self, key)}
        values = {key: value for key, value in values.items() if key not in dropped}
        return values if auto_map is None else {**values, "auto_map": auto_map}

    @property
    def class_names(self) -> list[str]:
        """Class names in label order, K of them."""
        names = {int(index): name for index, name in (self.id2label or {}).items()}
        return [names[index] for index in sorted(names)]

    def class_prompts(self) -> list[list[str]]:
        """The prompts of each class, K lists."""
        return class_prompts(
            self.class_names,
            self.templates or None,
            underscores=self.underscores,
            descriptions=self.class_descriptions,
            prompt_names=self.prompt_names,
        )


def apply_config(loaded: TaskResConfig, config: PreTrainedConfig | str | None, options: dict[str, Any]) -> None:
    """Take over the values that may be given to `from_pretrained`, out of `options` and a config given beside.

    Raises:
        ConfigurationError: the config given is not the artifact's.
    """
    if isinstance(config, str | os.PathLike):
        config = TaskResConfig.from_pretrained(config)
    if config is not None:
        # AutoModel puts whatever argument a config has into the config, so it is checked here.
        different = [key for key in (*_FIXED, *_UNUSED) if _comparable(config, key) != _comparable(loaded, key)]
        if different:
            why = "nothing here obeys that, give it to forward()"
            if set(different) & {*_FIXED, "label2id"}:
                why = "classes, prompts and base belong to the residual, for other classes make a model with from_base"
            raise ConfigurationError(
                f"The config given differs from the artifact's in {', '.join(different)}: {why}. On loading, only "
                f"{', '.join(_SETTABLE)} can be changed."
            )
        # What it only read from a file may be of an artifact that was saved over since.
        read = getattr(config, "_as_read", {})
        for key in _SETTABLE:
            if key not in read or getattr(config, key, None) != read[key]:
                setattr(loaded, key, getattr(config, key, getattr(loaded, key)))
    for key in _SETTABLE:
        if options.get(key) is not None:
            setattr(loaded, key, options[key])
        options.pop(key, None)


def base_options(options: Mapping[str, Any], method: str, positional: Sequence[Any] = ()) -> dict[str, Any]:
    """What goes to the base, out of the arguments of `from_base` or `from_pretrained`.

    Raises:
        TypeError: an argument that does not apply here, with a value that asks for something.
    """
    taken = (*BASE_KWARGS, *_IGNORED_KWARGS)
    wrong = {key: value for key, value in options.items() if value is not None and value is not False}
    shown = [f"{key}={value!r:.40}" for key, value in wrong.items() if key not in taken]
    if shown or positional:
        own = set(wrong) & {*_FIXED, *RECORDED, "label2id", "num_labels"}
        why = " Classes, prompts and base belong to the residual: make a new model with from_base." if own else ""
        more = f" Of the config, only {', '.join(_SETTABLE)} can be given." if method == "from_pretrained" else ""
        raise TypeError(
            f"{method}() got unexpected arguments: {', '.join([*map(repr, positional), *shown])}.{why}{more}"
        )
    return {key: options[key] for key in BASE_KWARGS if options.get(key) not in (None, False)}


def _comparable(config: PreTrainedConfig, key: str) -> Any:
    value = getattr(config, key, AS_PUBLISHED.get(key))
    if key in ("id2label", "label2id") and isinstance(value, Mapping):  # ids are text in JSON, and in some scripts
        return {str(one): str(other) for one, other in value.items()}
    return None if value in (False, "single_label_classification") else value


def split_hub_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes to the Hub client, and the rest."""
    hub = {key: kwargs[key] for key in _HUB_KWARGS if kwargs.get(key) is not None}
    return hub, {key: value for key, value in kwargs.items() if key not in _HUB_KWARGS}


def model_class_of(config: TaskResConfig, asked: Any, by_auto: bool = False) -> Any:
    """The class that serves a saved classifier: the one asked for, or where that is the general one, its own.

    Args:
        by_auto: whether a config came with it, as from `AutoModelForImageClassification`, whose callers give pictures.

    Raises:
        ConfigurationError: the class asked for serves another kind.
    """
    from . import TaskResForImageClassification, TaskResForSequenceClassification

    own: Any = TaskResForImageClassification if config.base_classifier is not None else None
    own = own if config.text_encoding is None else TaskResForSequenceClassification
    if own in (None, TaskResForImageClassification) and asked is TaskResForSequenceClassification:
        raise ConfigurationError(
            "The classifier is of pictures, not of texts: load it with TaskResCLIPForImageClassification, or with "
            "AutoModelForImageClassification and pipeline('image-classification')."
        )
    for_pictures = asked is not own and (by_auto or asked is TaskResForImageClassification)
    if own is TaskResForSequenceClassification and for_pictures:
        raise ConfigurationError(
            "The classifier is of texts, not of pictures: load it with TaskResForSequenceClassification, or with "
            "AutoModelForSequenceClassification and pipeline('text-classification')."
        )
    if own is None and asked is TaskResForImageClassification:
        raise ConfigurationError(
            "The classifier is over a dual encoder, not over an image tower alone: load it with "
            "TaskResCLIPForImageClassification.from_pretrained, or with AutoModelForImageClassification."
        )
    return own or asked
