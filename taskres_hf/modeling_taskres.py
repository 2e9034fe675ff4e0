"""`TaskResCLIPForImageClassification`: a frozen CLIP-like model with a task residual on its text classifier."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .artifact import CLASS_BIAS, RESIDUAL, SHIFT, as_json, find_artifact, read_artifact, write_artifact
from .base_classifier import PreparedBase, base_for_artifact, base_for_classes
from .classes import ChangesClasses
from .configuration_taskres import TaskResConfig, apply_config, base_options, model_class_of, split_hub_kwargs
from .encoders import (
    BaseSource,
    base_name,
    image_features,
    load_image_processor,
    load_tokenizer,
    pooled,
    score_parameters,
    trusted_base_name,
)
from .errors import BaseModelError, ConfigurationError
from .hub import AUTO_MAP, PUSH_OPTIONS, card_for, public_base_name, push_written, side_files
from .notebook import ShownInNotebooks
from .rejection import RejectsPictures
from .residual import TaskResClassifier
from .serving import ServedConfig

_NOTES = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_IMAGE_INPUTS = ("pixel_attention_mask", "spatial_shapes")


class TaskResCLIPForImageClassification(
    ShownInNotebooks, ServedConfig, RejectsPictures, ChangesClasses, PreTrainedModel
):
    """Image classifier over a frozen dual encoder: `weight_k = t_k + alpha * x_k` (TaskRes, arXiv 2211.10277).

    Make one with `from_base` (zero residual: zero-shot CLIP's logits) or `from_pretrained`; change its classes by name.

    Attributes:
        clip: the base, a `CLIPModel` or another dual encoder; frozen, always in eval mode.
        classifier: the head, a `TaskResClassifier`; its `residual` [K, D] is the only trainable parameter.
        image_processor: the base's image processor.
    """

    config_class = TaskResConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities: Any = ("image",)
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _no_split_modules = []  # noqa: RUF012 (the base class annotates it)
    # What differs over one tower alone, see `vision.modeling` and `language.modeling`.
    _head_class, _base_for_artifact = TaskResClassifier, staticmethod(base_for_artifact)

    def __init__(
        self, config: TaskResConfig, base: PreTrainedModel | None = None, base_classifier: Tensor | None = None
    ) -> None:
        super().__init__(config)
        if base is None or base_classifier is None:
            raise BaseModelError(
                "A TaskRes model needs its base model: use TaskResCLIPForImageClassification.from_base(base_model, "
                "class_names=[...]) for a new one or .from_pretrained(folder_or_repo) for a saved one."
            )
        self.clip = base
        scale, bias = score_parameters(base) if config.logit_scale is None else (config.logit_scale, config.logit_bias)
        self.classifier = self._head_class(base_classifier, config.alpha, scale, bias, config.residual_side)
        self.classifier.facts = config.facts  # one home: the head's reset and the config's readers see the same
        self.config = config  # of the head, so that both are exchanged in one step
        self.run_image_tower: Callable[[Any, Mapping[str, Tensor]], Tensor] | None = None  # see `embedding.use_engine`
        self._image_processor: Any = None
        self._tokenizer: Any = None
        self._base_source: BaseSource | None = None
        self._processor_source: BaseSource | None = None
        self._processor_values: dict[str, Any] | None = None
        self.post_init()  # type: ignore[no-untyped-call]
        self.clip.requires_grad_(False)
        self.train(self.training)
        # The base is never saved; set after post_init, which makes this a set per instance.
        self._keys_to_ignore_on_save = {key for key in self.state_dict() if key != f"classifier.{RESIDUAL}"}
        self.register_load_state_dict_pre_hook(_rename_residual)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------ making and loading

    @classmethod
    def from_base(
        cls,
        base_model: str | os.PathLike[str] | PreTrainedModel,
        class_names: Sequence[str] | Mapping[Any, Any] | Any,
        templates: str | Sequence[str] | None = None,
        alpha: float = 0.5,
        *,
        class_descriptions: Mapping[str, Sequence[str] | str] | None = None,
        prompt_names: Mapping[str, str] | None = None,
        underscores: str = "replace",
        prompt_average: str = "raw",
        residual_side: str = "text",
        problem_type: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        tokenizer: Any = None,
        image_processor: Any = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> TaskResCLIPForImageClassification:
        """A zero-shot classifier, ready to be trained.

        Args:
            base_model: Hub id or folder of a dual encoder, or one already loaded (then give `tokenizer` too unless
                it can be found by the model's name). In whatever dtype it runs, `t` is made in fp32.
            class_names: K names in label order, or a `datasets.ClassLabel`.
            templates: one template with `{}`, several (an ensemble), or a name such as `"imagenet"`; default
                `"a photo of a {}."`.
            alpha: scale of the residual (paper: 0.5).
            class_descriptions: sentences per class as prompts (CuPL); a string is one sentence.
            prompt_names: what stands in a prompt instead of a class name, such as {"n02123045": "tabby cat"}.
            underscores: `"replace"` or `"keep"` (as the published code does).
            prompt_average: `"raw"` (published) or `"normalized"`.
            residual_side: `"text"` (published: one row per class) or `"image"` (one shared row, TaskRes-Image).
            problem_type: `"multi_label_classification"` where a picture may have several labels, or none.
            revision: branch, tag or commit of the base; the commit is recorded.
            dtype: dtype of the base; fp32 by default, `"auto"` for the checkpoint's own. The head stays fp32.
            trust_remote_code: let the base run code from its repository; your decision, never read from a config.
            **kwargs: `device_map`, `attn_implementation`, `token`, `cache_dir`, `local_files_only` and so on, passed
                to the base.

        Raises:
            ClassNamesError, ConfigurationError: before anything is loaded.
            BaseModelError: the base is not a supported dual encoder, or its weights or tokenizer are not whole.
            HubError: the base is not found on the Hub or not to be read; says what to do.
        """
        config = TaskResConfig.for_classes(
            class_names, templates, class_descriptions=class_descriptions, prompt_names=prompt_names,
            underscores=underscores, prompt_average=prompt_average, alpha=alpha, residual_side=residual_side,
            problem_type=problem_type,
        )  # fmt: skip
        prompts = config.class_prompts()

        def make(loaded: Any, source: BaseSource, dtype: Any, options: Mapping[str, Any]) -> PreparedBase:
            return base_for_classes(loaded, source, dtype, options, prompts, prompt_average, tokenizer)

        made = cls._on_base(config, make, base_model, revision, dtype, trust_remote_code, kwargs)
        made._image_processor, made._tokenizer = image_processor, tokenizer
        return made  # type: ignore[no-any-return]

    @classmethod
    def _on_base(
        cls, config: TaskResConfig, make: Callable[..., PreparedBase], base_model: Any, revision: str | None,
        dtype: Any, trust_remote_code: bool, kwargs: dict[str, Any],
    ) -> Any:  # fmt: skip
        """A new model on the base that `make(loaded, source, dtype, options)` gives, which the config then names."""
        dtype = kwargs.pop("torch_dtype", None) or dtype
        hub, options = split_hub_kwargs(kwargs)
        options = base_options({key: value for key, value in options.items() if key != "subfolder"}, "from_base")
        loaded = base_model if isinstance(base_model, PreTrainedModel) else None
        name, subfolder = base_name(base_model), kwargs.get("subfolder") or None
        if subfolder and os.path.isdir(os.path.join(name, subfolder)):
            name, subfolder = os.path.join(name, subfolder), None
        if subfolder:
            hub["subfolder"] = subfolder
        base, table, facts, source = make(loaded, BaseSource(name, revision, hub, trust_remote_code), dtype, options)
        config.base_model_name_or_path = str(Path(name).resolve()) if os.path.isdir(name) else name
        config.base_model_revision = None if os.path.isdir(name) else source.revision
        config.base_model_subfolder, config.base_model_type = subfolder, base.config.model_type
        config.projection_dim, config.base_fingerprint, config.dtype = table.shape[1], facts, base.dtype
        config.logit_scale, config.logit_bias = facts["score"]
        model = cls(config, base, table)
        if name:
            model._base_source, model._processor_source = source, replace(source, hub=hub)
        return _place_head(model)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: PreTrainedConfig | str | None = None,
        revision: str | None = None,
        subfolder: str = "",
        dtype: torch.dtype | str | None = None,
        base_model: str | os.PathLike[str] | PreTrainedModel | None = None,
        base_revision: str | None = None,
        base_trust_remote_code: bool = False,
        accept_base_mismatch: bool = False,
        text_tower: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a saved classifier and its base.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the artifact.
            revision: branch, tag or commit of the artifact. The base comes from the commit stored in the artifact.
            dtype: dtype of the base; None or `"auto"` for the one it was saved with. The head stays fp32.
            base_model: another place to load the base from, or one already loaded (shared between classifiers).
            base_revision: another commit of the base.
            base_trust_remote_code: let the base run code from its repository.
            accept_base_mismatch: load although the base gives other text embeddings than in training.
            text_tower: load the text tower too. Classifying does not need it: once the base classifier is known on
                this machine, only the image tower is mapped into memory.
            **kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies` (both repositories);
                `device_map`, `attn_implementation`, `quantization_config` (the base); `alpha`, `strength` or
                `return_dict` instead of the stored value. Other arguments of transformers' may be None or False.

        Returns:
            The model in eval mode; with `output_loading_info`, also a dict of (empty) missing and unexpected keys.

        Raises:
            ArtifactError: the artifact is incomplete or damaged.
            BaseMismatchError: the base no longer matches, in its text side or its image tower.
            ConfigurationError: `config` is another classifier's.
            TypeError: an argument that does not apply.
            HubError: a repository or revision is not found or not to be read; says which and what to do.
        """
        name, older = os.fspath(pretrained_model_name_or_path), kwargs.pop("torch_dtype", None)
        dtype, subfolder = older if dtype is None else dtype, subfolder or ""
        hub, options = split_hub_kwargs(kwargs)
        paths = find_artifact(pretrained_model_name_or_path, revision, subfolder, **hub)
        values, tensors, processor = read_artifact(*paths)
        loaded = TaskResConfig.from_dict(values)
        cls = model_class_of(loaded, cls, config is not None)
        apply_config(loaded, config, options)
        options = base_options(options, "from_pretrained", model_args)
        absorbed = getattr(config, "_attn_implementation_internal", None)  # AutoModel puts it into the config
        if absorbed is not None:
            options.setdefault("attn_implementation", absorbed)

        local = os.path.isdir(name)
        pinned = base_revision or (None if isinstance(base_model, str | os.PathLike) else loaded.base_model_revision)
        if base_model is not None:
            base_name(base_model)  # only to refuse what is no base
        inside = {"subfolder": loaded.base_model_subfolder} if loaded.base_model_subfolder and not base_model else {}
        where = trusted_base_name(loaded, base_model, local)
        source = BaseSource(where, pinned, {**hub, **inside}, base_trust_remote_code, base_model is None)
        if dtype is None or dtype == "auto":
            dtype = loaded.dtype or torch.float32
        shared = base_model if isinstance(base_model, PreTrainedModel) else None
        base, table, facts, source = cls._base_for_artifact(
            loaded, source, shared, dtype, options, text_tower=text_tower, accept_mismatch=accept_base_mismatch
        )
        loaded.logit_scale, loaded.logit_bias = facts["score"]
        loaded.dtype, loaded.architectures, loaded._name_or_path = base.dtype, [cls.__name__], name
        model = cls(loaded, base, table)
        with torch.no_grad():
            model.classifier.residual.copy_(tensors[RESIDUAL])
        model.classifier.shift, model.classifier.class_bias = tensors.get(SHIFT), tensors.get(CLASS_BIAS)
        model._base_source, model._processor_values = source, processor
        model._processor_source = BaseSource(name, revision, {**hub, **({"subfolder": subfolder} if subfolder else {})})
        _place_head(model).train(False)
        return (model, {key: set() for key in _NOTES}) if output_loading_info else model

    # ------------------------------------------------------------------ classifying

    def forward(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Classify pictures or their embeddings.

        Args:
            pixel_values: [N, 3, H, W] from the image processor.
            image_embeds: [N, D] instead, from `get_image_features`, normalised or not.
            labels: [N] class ids, or [N, K] probabilities (mixup, label smoothing): floats from 0 to 1, each row with
                the sum 1. Adds the mean cross-entropy as `loss`. With several labels per picture [N, K] from 0 to 1,
                each class by itself, and the mean binary cross-entropy.
            **kwargs: what else the base's image tower takes (`pixel_attention_mask`, `spatial_shapes`,
                `interpolate_pos_encoding`); `num_items_in_batch` from `transformers.Trainer` scales the loss.

        Returns:
            `ImageClassifierOutput` with `logits` [N, K] fp32; a tuple if `return_dict` is False.

        Raises:
            ConfigurationError: both or neither of pixel values and embeddings, a wrong embedding size, a label
                outside the classes, rows that are no probabilities, or an answer that is not finite.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ConfigurationError("Pass either pixel_values or image_embeds; got both or neither.")
        features = None
        if image_embeds is None:
            names = ("interpolate_pos_encoding", "output_attentions", "output_hidden_states")
            asked = (kwargs.get(names[0]), output_attentions, output_hidden_states)
            options = {name: True for name, wanted in zip(names, asked, strict=True) if wanted}
            given = {"pixel_values": pixel_values, **{key: kwargs.get(key) for key in _IMAGE_INPUTS}}
            inputs = {key: value for key, value in given.items() if value is not None}
            if self.run_image_tower is None or options or self.training or len(inputs) > 1:
                with torch.no_grad():
                    features = image_features(self.clip, inputs, **options)
                image_embeds = pooled(features)
            else:
                image_embeds = self.run_image_tower(self.clip, inputs)
        elif image_embeds.shape[-1] != self.config.projection_dim:
            raise ConfigurationError(
                f"image_embeds must have {self.config.projection_dim} columns, the base's projection size; got "
                f"{tuple(image_embeds.shape)}. Use the projected features of {self.config.base_model_name_or_path}."
            )
        kept = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        loss_of = (labels, kwargs.get("num_items_in_batch"))
        return self._answer(ImageClassifierOutput, image_embeds, loss_of, features, kept, return_dict)

    def zero_shot_logits(
        self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Logits [N, K] of the base classifier alone; arguments as in `forward`."""
        if (pixel_values is None) == (image_embeds is None):
            raise ConfigurationError("Pass either pixel_values or image_embeds; got both or neither.")
        if image_embeds is None:
            image_embeds = self.get_image_features(pixel_values, **kwargs)
        return self.classifier.zero_shot_logits(image_embeds)

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor | None, **kwargs: Any) -> Tensor:
        """Image embeddings [N, D] of the frozen base, projected and not normalised; arguments as in `forward`."""
        inputs = {"pixel_values": pixel_values, **{key: kwargs.get(key) for key in _IMAGE_INPUTS}}
        options = {"interpolate_pos_encoding": True} if kwargs.get("interpolate_pos_encoding") else {}
        return pooled(image_features(self.clip, inputs, **options))

    def init_weights(self) -> None:
        """Nothing to do: the residual starts at zero and the base comes with its weights, which must not be touched."""

    def train(self, mode: bool = True) -> TaskResCLIPForImageClassification:
        """Switch the head's mode; the base stays in eval mode (dropout and batch statistics off)."""
        super().train(mode)
        if hasattr(self, "clip"):
            self.clip.eval()
        return self

    @property
    def strength(self) -> float:
        """From 0 (the zero-shot classifier) to 1 (as trained, the default); set it at any time."""
        return float(self.classifier.strength)

    @strength.setter
    def strength(self, value: float) -> None:
        self.classifier.strength = value

    @property
    def class_names(self) -> list[str]:
        """Class names in label order."""
        return list(self.config.class_names)

    def class_prompts(self) -> list[list[str]]:
        """The prompts of each class, K lists."""
        return list(self.config.class_prompts())

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer; loaded when first needed."""
        if self._tokenizer is None:
            if self._base_source is None:
                raise ConfigurationError("The base model has no name to find its tokenizer by: pass tokenizer=.")
            self._tokenizer = load_tokenizer(self._base_source)
        return self._tokenizer

    @property
    def image_processor(self) -> Any:
        """The image processor pictures must go through; loaded when first needed."""
        if self._image_processor is None:
            if self._processor_source is None:
                raise ConfigurationError("The base has no name to find its image processor by: set image_processor.")
            self._image_processor = load_image_processor(self._processor_source, self._processor_values)
        return self._image_processor

    @image_processor.setter
    def image_processor(self, value: Any) -> None:
        self._image_processor = value

    # ------------------------------------------------------------------ saving

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        residual_dtype: torch.dtype = torch.float32,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the residual, the config, the image processor and a card; never the base, never over the network.

        Args:
            save_directory: folder, created when missing. A README.md that a person wrote is kept.
            is_main_process: nothing is written when False (several processes).
            state_dict: takes the residual from here, as `transformers.Trainer` does.
            push_to_hub: upload afterwards, to `repo_id=` or the folder's name; see `push_to_hub`.
            residual_dtype: `torch.float16` halves the file.
            include_code: add the module that `trust_remote_code=True` needs where the library is not installed.
            **kwargs: passed to `push_to_hub`; sizes of shards and the like are accepted and ignored.

        Raises:
            ArtifactError: the residual is not finite, the folder cannot be written, or what was written would not
                load again; the old artifact stays.
        """
        if residual_dtype not in (torch.float32, torch.float16):
            raise ConfigurationError(f"`residual_dtype` must be torch.float32 or torch.float16; got {residual_dtype}.")
        if is_main_process:
            name = self.config.base_model_name_or_path
            self._write(save_directory, name, state_dict, residual_dtype, include_code, kwargs)
        if push_to_hub:
            self.push_to_hub(
                kwargs.get("repo_id") or Path(save_directory).name,
                residual_dtype=residual_dtype,
                include_code=include_code,
                **{key: kwargs[key] for key in (*PUSH_OPTIONS, "tags") if key in kwargs},
            )

    def _write(
        self, folder: Any, base_name: str | None, state: Any, dtype: torch.dtype, include_code: bool, kwargs: Any
    ) -> None:
        """Write the artifact, naming the base `base_name`."""
        head, state = self.classifier, state or {}
        config = head.config  # not that of an answer which this thread may hold
        residual = state.get(f"classifier.{RESIDUAL}", state.get(RESIDUAL, head.residual))
        found = {RESIDUAL: (residual, dtype), SHIFT: (head.shift, dtype), CLASS_BIAS: (head.class_bias, torch.float32)}
        tensors = {name: tensor.detach().to(kind) for name, (tensor, kind) in found.items() if tensor is not None}
        include_code = include_code or getattr(self, "_auto_class", None) is not None
        config.architectures, config.dtype = [type(self).__name__], self.clip.dtype
        code = AUTO_MAP if include_code else None
        values = as_json(config.to_save(base_name, SHIFT in tensors, CLASS_BIAS in tensors, code))
        prepares = "image" in self.input_modalities and bool(self._image_processor or self._processor_source)
        extra = side_files(self.image_processor if prepares else None, include_code)
        extra["README.md"] = card_for(values, kwargs.get("repo_id"), kwargs.get("tags"), Path(folder) / "README.md")
        write_artifact(folder, values, tensors, extra)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
        tags: list[str] | None = None,
        residual_dtype: torch.dtype = torch.float32,
        include_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Upload the artifact (kilobytes) in one commit; arguments as in `PreTrainedModel.push_to_hub`.

        A base that is a folder of this machine is named by its last part only: whoever loads the artifact must then
        pass `base_model=`. A busy Hub is asked again for up to five minutes; what people wrote into the card of the
        revision that is pushed to is kept.

        Args:
            revision: a branch, made from `main` when missing, or a pull request's `refs/pr/1`.
            create_pr: open a pull request on `main` instead.
            parent_commit: refuse if the branch has moved on from this commit.

        Returns:
            `huggingface_hub.CommitInfo`; of the last commit, where nothing had changed.

        Raises:
            HubError: the Hub cannot be reached, is busy or refuses; the artifact is kept in the folder it names.
            ConfigurationError: `revision` cannot be pushed to, or `private` contradicts a public repository.
        """
        name = self.config.base_model_name_or_path
        public = name if name is None else public_base_name(name)
        names = {"repo_id": repo_id, "tags": tags}
        return push_written(
            lambda folder: self._write(folder, public, None, residual_dtype, include_code, names), repo_id, token=token,
            private=private, revision=revision, create_pr=create_pr, commit_message=commit_message,
            commit_description=commit_description, parent_commit=parent_commit,
        )  # fmt: skip


def _rename_residual(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Files name the tensor `residual`; the module tree calls it `classifier.residual` (Trainer resumes this way)."""
    if f"{prefix}{RESIDUAL}" in state_dict:
        state_dict[f"{prefix}classifier.{RESIDUAL}"] = state_dict.pop(f"{prefix}{RESIDUAL}")


def _place_head(model: TaskResCLIPForImageClassification) -> TaskResCLIPForImageClassification:
    if model.clip.device.type != "meta":
        model.classifier.to(model.clip.device)
    return model
