"""`TaskResForSequenceClassification`: a task residual over a model of texts alone."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..alone.labels import CLASS_MEANS, HEAD, choose_labels, match_labels
from ..alone.linear_head import LinearHead
from ..alone.towers import head_rows, located, prepared, read_head, target_dtype
from ..artifact import find_artifact, read_checked
from ..base_classifier import PreparedBase
from ..configuration_taskres import TaskResConfig, split_hub_kwargs
from ..encoders import BaseSource, load_tokenizer, trusted_base_name
from ..errors import ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..residual import TaskResClassifier
from .encoding import HEAD_POOLING, POOLINGS, TextEncoding, longest, positions_of, stated_encoding, with_prompt
from .tower import CLASS_NAMES, TextTower, as_tower, embedding_length, head_of, load_text_model, made_of

DEFAULT_TEMPLATE = "This sentence is about {}."


def _base_for_artifact(
    config: TaskResConfig,
    source: BaseSource,
    shared: PreTrainedModel | None,
    dtype: Any,
    options: Mapping[str, Any],
    *,
    text_tower: bool = False,
    accept_mismatch: bool = False,
) -> PreparedBase:
    """As `base_classifier.base_for_artifact`, of a model of texts alone."""
    encoding = TextEncoding.of_config(config)
    model, untrained, commit = (shared, False, None) if shared is not None else load_text_model(source, dtype, options)
    tower = as_tower(model, encoding.pooling, untrained)
    target = None if shared is not None else target_dtype(tower, dtype, options)
    stored, source = None if accept_mismatch else config.base_fingerprint or {}, located(source, shared, commit)
    made = made_of(tower, _tokenizer(source, config) if config.base_classifier == CLASS_NAMES else None, config)
    return prepared(tower, config, source, made, target, stored)


def _tokenizer(source: BaseSource, config: TaskResConfig, given: Any = None) -> Any:
    """The base's tokenizer with a config's prompt and length, or one that is given, which stays as it is."""
    if given is None and not source.name:
        raise ConfigurationError("The base model has no name to find its tokenizer by: pass tokenizer=.")
    encoding = TextEncoding.of_config(config)
    loaded = load_tokenizer(source) if given is None else copy.deepcopy(given)
    return with_prompt(loaded, encoding.prompt, encoding.max_length)


class TaskResForSequenceClassification(TaskResCLIPForImageClassification):
    """Text classifier over a frozen sentence encoder or another model of texts: BERT, RoBERTa, MPNet, E5 and the like.

    The residual is added to the embeddings of the class names by the same encoder; or to the rows of a pretrained head
    that knows the classes, where a zero residual gives the model's own logits bit for bit; or to class means.

    Attributes:
        clip, backbone: the base, a `language.tower.TextTower`; frozen, always in eval mode.
        classifier: the head, a `TaskResClassifier` or, over a pretrained head or class means, an
            `alone.linear_head.LinearHead`.
        encoding: how a text becomes an embedding.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    _base_for_artifact = staticmethod(_base_for_artifact)
    clip: TextTower

    def __init__(
        self, config: TaskResConfig, base: PreTrainedModel | None = None, base_classifier: Tensor | None = None
    ) -> None:
        super().__init__(config, base, base_classifier)
        if config.base_classifier == HEAD:
            self.classifier.base_bias = head_rows(self.clip, config)[1]

    @property
    def _head_class(self) -> Any:  # type: ignore[override]
        return TaskResClassifier if self.config.base_classifier == CLASS_NAMES else LinearHead

    @classmethod
    def from_base(
        cls,
        base_model: str | os.PathLike[str] | PreTrainedModel,
        class_names: Sequence[str] | Mapping[Any, Any] | Any,
        templates: str | Sequence[str] | None = None,
        alpha: float = 0.5,
        *,
        base_classifier: str | None = None,
        class_descriptions: Mapping[str, Sequence[str] | str] | None = None,
        prompt_names: Mapping[str, str] | None = None,
        underscores: str = "replace",
        pooling: str | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> TaskResForSequenceClassification:
        """A classifier ready to be trained and, unless it starts from class means, to be used.

        Args:
            base_model: Hub id or folder of a sentence-transformers model, or of what
                `AutoModelForSequenceClassification` or `AutoModel` loads; or such a model already loaded, which is left
                as it is (then give `tokenizer` too unless it can be found by the model's name).
            class_names: K names in label order, or a `datasets.ClassLabel`.
            templates: one with `{}` or several; default `"This sentence is about {}."`.
            alpha: scale of the residual (paper: 0.5).
            base_classifier: `"class_names"` (embeddings of the names in the templates), `"head"` (rows of the
                pretrained head, whose labels are matched as in `TaskResForImageClassification`), `"class_means"` of
                the shots, or None: the head if there is one that knows every class and no template is given, else the
                names.
            class_descriptions: sentences per class as prompts; a string is one sentence.
            prompt_names: what stands in a prompt instead of a class name; over a head, the label of a class.
            underscores: `"replace"` or `"keep"` in prompts.
            pooling: `"mean"` (over the attention mask), `"cls"` or `"max"`; by default what the checkpoint says as a
                sentence-transformers model, else the mean. A head is given what it was trained on.
            prompt: stands before each text and each class's prompt, such as `"query: "` for E5; by default what the
                checkpoint names as its default, else nothing.
            max_length: most tokens of a text; by default what checkpoint and tokenizer say.
            revision, dtype, trust_remote_code, kwargs: see `TaskResCLIPForImageClassification`.

        Raises:
            ClassNamesError: the head is asked for and lacks a class, or two classes are one label.
            ConfigurationError: a head is asked for where there is none, or an argument without meaning for texts.
            BaseModelError: the base reads pictures, has modules that are not to be had, or its weights are not whole.
            HubError: the base is not found on the Hub or not to be read; says what to do.
        """
        _refuse(kwargs)
        if pooling is not None and pooling not in POOLINGS:
            raise ConfigurationError(f"`pooling` must be one of {', '.join(POOLINGS)} or None; got {pooling!r}.")
        if prompt is not None and (not isinstance(prompt, str) or "\0" in prompt):
            raise ConfigurationError(f"`prompt` must be text that stands before each text; got {prompt!r}.")
        config = TaskResConfig.for_classes(
            class_names, templates or (DEFAULT_TEMPLATE if class_descriptions is None else None), alpha=alpha,
            class_descriptions=class_descriptions, prompt_names=prompt_names, underscores=underscores,
            base_classifier=CLASS_NAMES,
        )  # fmt: skip
        config.class_prompts()  # names in `prompt_names` that are no class, templates without {}
        words = base_classifier or (CLASS_NAMES if templates or class_descriptions else None)

        def tower_of(model: Any, source: BaseSource, untrained: bool = False) -> TextTower:
            """The tower that the classifier needs, once `config` says what its rows are and how texts are pooled."""
            stated = stated_encoding(source)
            _choose_rows(config, model, untrained, words)
            known = getattr(model, "pooling", None) if isinstance(model, TextTower) else stated.get("pooling")
            by = HEAD_POOLING if config.base_classifier == HEAD else pooling or known or "mean"
            before = stated.get("prompt", "") if prompt is None else prompt
            length = longest(model.config, tokenizer or load_tokenizer(source), max_length, stated.get("max_length"))
            config.text_encoding = TextEncoding(by, before, length).as_dict()
            return as_tower(model, by, untrained)

        def make(loaded: Any, source: BaseSource, dtype: Any, options: Mapping[str, Any]) -> PreparedBase:
            tower, commit = loaded, None
            if tower is None:
                stated_encoding(source)  # what is refused, before any weight is read
                model, untrained, commit = load_text_model(source, dtype, options)
                source = located(source, None, commit)
                tower = tower_of(model, source, untrained)
            config.projection_dim = embedding_length(tower)
            made = made_of(tower, _tokenizer(source, config, tokenizer), config)
            target = None if loaded is not None else target_dtype(tower, dtype, options)
            return prepared(tower, config, located(source, loaded, commit), made, target)

        base: Any = base_model
        if isinstance(base_model, PreTrainedModel):
            base = tower_of(base_model, BaseSource(str(base_model.config._name_or_path), revision))
        result: TaskResForSequenceClassification = cls._on_base(
            config, make, base, revision, dtype, trust_remote_code, kwargs
        )
        result._tokenizer = None if tokenizer is None else _tokenizer(BaseSource(""), result.config, tokenizer)
        return result

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in `TaskResCLIPForImageClassification`; a loaded `base_model` is one of texts alone.

        Raises:
            ConfigurationError: the classifier is of pictures.
        """
        base: Any = base_model
        if isinstance(base_model, PreTrainedModel) and not isinstance(base_model, TextTower):
            where = (pretrained_model_name_or_path, kwargs.get("revision"), kwargs.get("subfolder") or "")
            encoding = read_checked(*find_artifact(*where, **split_hub_kwargs(kwargs)[0])).config.get("text_encoding")
            base = as_tower(base_model, (encoding or {}).get("pooling", "mean"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, base_model=base, **kwargs)

    # ------------------------------------------------------------------ classifying

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        text_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Classify texts or their embeddings.

        Args:
            input_ids, attention_mask, token_type_ids: [N, L] from `tokenizer`.
            text_embeds: [N, D] instead, from `get_text_features`.
            labels: [N] class ids, or [N, K] probabilities. Adds the mean cross-entropy as `loss`.
            **kwargs: `num_items_in_batch` from `transformers.Trainer` scales the loss.

        Returns:
            `SequenceClassifierOutput` with `logits` [N, K] fp32; a tuple if `return_dict` is False.

        Raises:
            ConfigurationError: both or neither of tokens and embeddings, embeddings of a wrong size, texts longer than
                the model reads, a label outside the classes, or an answer that is not finite.
        """
        if (input_ids is None) == (text_embeds is None):
            raise ConfigurationError("Pass either input_ids or text_embeds; got both or neither.")
        features = None
        if text_embeds is None:
            wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
            options = {name: True for name, value in wanted.items() if value}
            features = self._features(input_ids, attention_mask, token_type_ids, **options)
            text_embeds = features.pooler_output
        elif text_embeds.shape[-1] != self.config.projection_dim:
            raise ConfigurationError(
                f"text_embeds must have {self.config.projection_dim} columns, the base's size; got "
                f"{tuple(text_embeds.shape)}."
            )
        kept = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        loss_of = (labels, kwargs.get("num_items_in_batch"))
        return self._answer(SequenceClassifierOutput, text_embeds, loss_of, features, kept, return_dict)

    @torch.no_grad()
    def _features(self, input_ids: Any, attention_mask: Any, token_type_ids: Any, **options: Any) -> Any:
        longest_text = self.encoding.max_length
        if input_ids.shape[1] > max(longest_text, positions_of(self.clip.config) or input_ids.shape[1]):
            raise ConfigurationError(
                f"A text has {input_ids.shape[1]} tokens, and the model reads {longest_text}: tokenize with "
                "truncation=True, as in pipeline(...)(texts, truncation=True)."
            )
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        tokens = {name: value for name, value in given.items() if value is not None}
        return self.clip.embed(input_ids=input_ids, **tokens, **options)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Text embeddings [N, D] of the frozen base, pooled and not normalised; arguments as in `forward`."""
        features: Tensor = self._features(input_ids, attention_mask, token_type_ids).pooler_output
        return features

    def zero_shot_logits(  # type: ignore[override]
        self, input_ids: Tensor | None = None, text_embeds: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Logits [N, K] of the base classifier alone; arguments as in `forward`."""
        if (input_ids is None) == (text_embeds is None):
            raise ConfigurationError("Pass either input_ids or text_embeds; got both or neither.")
        if text_embeds is None:
            text_embeds = self.get_text_features(input_ids, **kwargs)  # type: ignore[arg-type]
        return self.classifier.zero_shot_logits(text_embeds)

    @property
    def encoding(self) -> TextEncoding:
        """How a text becomes an embedding."""
        return TextEncoding.of_config(self.config)

    @property
    def backbone(self) -> TextTower:
        """The frozen model of texts."""
        return self.clip

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, which puts the classifier's `prompt` before each text; loaded when first needed."""
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(self._base_source or BaseSource(""), self.config)
        return self._tokenizer

    def base_again(self) -> tuple[Tensor, dict[str, Any]]:
        """The base classifier [K, D] made anew, and its fingerprint."""
        return self.base_rows(self.config)

    def base_rows(self, config: Any) -> tuple[Tensor, dict[str, Any]]:
        """The base classifier [K, D] of a config's classes, and its fingerprint."""
        needed = config.base_classifier == CLASS_NAMES
        return made_of(self.clip, self.tokenizer if needed else None, config)

    # ------------------------------------------------------------------ what is for pictures

    @property
    def image_processor(self) -> NoReturn:
        raise ConfigurationError("The classifier is of texts, which need no image processor: it has a tokenizer.")

    @image_processor.setter
    def image_processor(self, value: Any) -> None:
        raise ConfigurationError("The classifier is of texts, which need no image processor: it has a tokenizer.")

    def get_image_features(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not to be had: see `get_text_features`."""
        raise ConfigurationError("The classifier is of texts: use get_text_features.")

    def save_pretrained(self, *args: Any, include_code: bool = False, **kwargs: Any) -> None:
        """As in `TaskResCLIPForImageClassification`; `include_code` is not to be had."""
        _refuse({"include_code": include_code})
        super().save_pretrained(*args, **kwargs)

    def push_to_hub(  # type: ignore[override]
        self, *args: Any, include_code: bool = False, **kwargs: Any
    ) -> Any:
        """As in `TaskResCLIPForImageClassification`; `include_code` is not to be had."""
        _refuse({"include_code": include_code})
        return super().push_to_hub(*args, **kwargs)


_OF_PICTURES = ("residual_side", "image_processor", "text_encoder", "prompt_average", "include_code")


def _refuse(kwargs: dict[str, Any]) -> None:
    """Refuse what is for classifiers of pictures."""
    given = [name for name in _OF_PICTURES if kwargs.pop(name, None) not in (None, False)]
    if given:
        raise ConfigurationError(f"{', '.join(given)}: not to be had for classifiers of texts. Leave it out.")
    if kwargs.pop("problem_type", None) not in (None, "single_label_classification"):
        raise ConfigurationError("A classifier of texts gives one label a text: leave problem_type out.")


def _choose_rows(config: TaskResConfig, model: Any, untrained: bool, wanted: str | None) -> None:
    """Write into a config where its rows come from, and for a head the label of each class.

    Raises:
        ClassNamesError, ConfigurationError: see `from_base`.
    """
    if wanted not in (None, HEAD, CLASS_NAMES, CLASS_MEANS):
        raise ConfigurationError(
            f"`base_classifier` must be 'class_names', 'head', 'class_means' or None; got {wanted!r}."
        )
    names, given = config.class_names, config.prompt_names or {}
    name = None if untrained or isinstance(model, TextTower) else head_of(model)
    head = model.head if isinstance(model, TextTower) else None if name is None else read_head(model, name)
    if wanted is None and head is not None:
        places = match_labels([given.get(one, one) for one in names], head.labels)
        knows = len(set(places) - {None}) == len(names)
        wanted = HEAD if knows else CLASS_NAMES
    config.base_classifier = wanted or CLASS_NAMES
    if config.base_classifier == CLASS_NAMES:
        return
    labels = choose_labels(names, given, head and head.labels, config.base_classifier)
    config.templates, config.class_descriptions, config.underscores = ["{}"], None, "keep"
    config.prompt_names = {one: word for one, word in (labels or {}).items() if one != word} or None


class TaskResTokenizer:
    """What `AutoTokenizer` and `pipeline("text-classification")` load for a saved classifier: its base's tokenizer.

    No file of a tokenizer lies in an artifact, which names the base that has them.
    """

    config_class = TaskResConfig

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *inputs: Any,
        revision: str | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> Any:
        """The tokenizer of a classifier of texts, with its prompt and length.

        Args:
            name_or_path: folder or Hub id of the artifact. revision: of the artifact.

        Raises:
            ConfigurationError: the classifier is of pictures. ArtifactError: damaged. BaseModelError: no tokenizer.
        """
        hub, _ = split_hub_kwargs(kwargs)
        values = read_checked(*find_artifact(name_or_path, revision, subfolder or "", **hub)).config
        config = TaskResConfig.from_dict(values)
        if config.text_encoding is None:
            raise ConfigurationError("The classifier is of pictures: it has an image processor, and no tokenizer.")
        where = trusted_base_name(config, None, os.path.isdir(name_or_path))
        inside = {"subfolder": config.base_model_subfolder} if config.base_model_subfolder else {}
        source = BaseSource(where, config.base_model_revision, {**hub, **inside}, stored=True)
        return _tokenizer(source, config)
