"""`TaskResCLIPForImageClassification`: a frozen CLIP-like model with a task residual on its text classifier."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.import_utils import is_torchvision_available

from .artifact import find_artifact, library_versions, read_artifact, trusted_base_name, write_artifact
from .base_classifier import base_embeddings, cached_table_path, check_fingerprint, fingerprint, read_table, write_table
from .base_model import (
    BASE_KWARGS,
    check_same_base,
    has_text_tower,
    load_base_fp32,
    load_image_tower,
    load_tokenizer,
    split_kwargs,
    torch_dtype,
)
from .configuration_taskres import TaskResConfig
from .encoders import image_features, pooled, score_parameters
from .errors import ArtifactError, BaseMismatchError, BaseModelError, ConfigurationError
from .prompts import check_class_names, class_prompts, resolve_templates
from .residual import TaskResClassifier
from .storage import RESIDUAL

# What the Auto classes and pipeline pass along and a single small safetensors file has no use for.
_IGNORED_KWARGS = {
    "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "low_cpu_mem_usage", "use_safetensors",
    "weights_only", "variant", "code_revision", "trust_remote_code", "offload_state_dict",
}  # fmt: skip


class TaskResCLIPForImageClassification(PreTrainedModel):
    """Image classifier over a frozen dual encoder: `weight_k = t_k + alpha * x_k` (TaskRes, arXiv 2211.10277).

    Make one with `from_base` (zero residual: logits equal zero-shot CLIP's) or `from_pretrained` (a saved one).

    Attributes:
        clip: the base, a `CLIPModel` or another dual encoder; frozen, always in eval mode.
        classifier: the head, a `TaskResClassifier`; its `residual` [K, D] is the only trainable parameter.
        image_processor: the base's image processor.
    """

    config_class = TaskResConfig
    config: TaskResConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities: Any = ("image",)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = []  # noqa: RUF012 (the base class annotates it)

    def __init__(
        self,
        config: TaskResConfig,
        base: PreTrainedModel | None = None,
        base_classifier: Tensor | None = None,
    ) -> None:
        super().__init__(config)
        if base is None or base_classifier is None:
            raise BaseModelError(
                "A TaskRes model needs its base model: use TaskResCLIPForImageClassification.from_base(base_model, "
                "class_names=[...]) for a new one or .from_pretrained(folder_or_repo) for a saved one."
            )
        self.clip = base
        scale, bias = score_parameters(base)
        self.classifier = TaskResClassifier(base_classifier, config.alpha, scale, bias, config.residual_side)
        self._image_processor: Any = None
        self._tokenizer: Any = None
        self._base_source: tuple[str, dict[str, Any]] | None = None
        self._processor_source: tuple[str, dict[str, Any]] | None = None
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
        class_descriptions: Mapping[str, Sequence[str]] | None = None,
        prompt_names: Mapping[str, str] | None = None,
        underscores: str = "replace",
        prompt_average: str = "raw",
        residual_side: str = "text",
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
                it can be found by the model's name).
            class_names: K names in label order, or a `datasets.ClassLabel`.
            templates: one template with `{}`, several (an ensemble), or a name such as `"imagenet"`; default
                `"a photo of a {}."`.
            alpha: scale of the residual (paper: 0.5).
            class_descriptions: sentences per class as prompts (CuPL).
            prompt_names: what stands in a prompt instead of a class name, such as {"n02123045": "tabby cat"}.
            underscores: `"replace"` or `"keep"` (as the published code does).
            prompt_average: `"raw"` (published) or `"normalized"`.
            residual_side: `"text"` (published: one row per class) or `"image"` (one shared row, TaskRes-Image).
            revision: branch, tag or commit of the base; the commit is recorded.
            dtype: dtype of the base; fp32 by default, `"auto"` for the checkpoint's own. The head stays fp32.
            trust_remote_code: let the base run code from its repository; your decision, never read from a config.
            **kwargs: `device_map`, `attn_implementation`, `token`, `cache_dir`, `local_files_only` and so on, passed
                to the base.

        Raises:
            ClassNamesError, ConfigurationError: before anything is loaded.
            BaseModelError: the base is not a supported dual encoder.
        """
        names = check_class_names(class_names)
        if templates is not None or class_descriptions is None:
            templates = resolve_templates(templates)
        prompts = class_prompts(
            names, templates, underscores=underscores, descriptions=class_descriptions, prompt_names=prompt_names
        )
        hub, base_kwargs = split_kwargs(kwargs)
        commit = None
        if isinstance(base_model, PreTrainedModel):
            base, name = base_model.eval().requires_grad_(False), base_model.config._name_or_path
            target = base.dtype
        else:
            name = os.fspath(base_model)
            base, commit, target = load_base_fp32(name, revision, dtype, trust_remote_code, hub, base_kwargs)
        if tokenizer is None:
            if not name:
                raise ConfigurationError("The base model has no name to find its tokenizer by: pass tokenizer=.")
            tokenizer = load_tokenizer(name, revision=commit or revision, **hub)
        table = base_embeddings(base, tokenizer, prompts, prompt_average)
        if not isinstance(base_model, PreTrainedModel):
            write_table(cached_table_path(name, commit, prompts, prompt_average), table)
        base.to(target) if base.dtype != target else None
        scale, bias = score_parameters(base)
        config = TaskResConfig(
            base_model_name_or_path=str(Path(name).resolve()) if Path(name).is_dir() else name,
            base_model_revision=commit,
            base_model_type=base.config.model_type,
            projection_dim=table.shape[1],
            templates=list(templates or []),
            class_descriptions={key: list(value) for key, value in class_descriptions.items()}
            if class_descriptions
            else None,
            prompt_names=dict(prompt_names) if prompt_names else None,
            underscores=underscores,
            prompt_average=prompt_average,
            alpha=alpha,
            residual_side=residual_side,
            logit_scale=scale,
            logit_bias=bias,
            base_fingerprint=fingerprint(table, prompts, prompt_average),
            id2label=dict(enumerate(names)),
            label2id={label: index for index, label in enumerate(names)},
            dtype=str(base.dtype).removeprefix("torch."),
        )
        model = cls(config, base, table)
        model._image_processor, model._tokenizer = image_processor, tokenizer
        if name:
            model._base_source = model._processor_source = (name, {**hub, "revision": commit or revision})
        return _place_head(model)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: PreTrainedConfig | None = None,
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
                `device_map`, `attn_implementation`, `quantization_config` (the base); or a config value such as
                `alpha`.

        Returns:
            The model in eval mode; with `output_loading_info`, also a dict of (empty) missing and unexpected keys.

        Raises:
            ArtifactError: the artifact is incomplete or damaged.
            BaseMismatchError: the base no longer matches.
            OSError: a repository or file is not found, as raised by the Hub client.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if "torch_dtype" in kwargs:
            dtype = kwargs.pop("torch_dtype") if dtype is None else dtype
        local = os.path.isdir(name)
        hub, kwargs = split_kwargs(kwargs, separate_hub_only=True)
        values, residual, shift = read_artifact(*find_artifact(name, revision, subfolder, **hub))
        loaded: TaskResConfig = (config if config is not None else cls.config_class).from_dict(values)  # type: ignore[assignment]
        if config is not None:
            loaded._name_or_path = config._name_or_path
            loaded.alpha = getattr(config, "alpha", loaded.alpha)
            if kwargs.get("attn_implementation") is None:
                # AutoModel absorbs attn_implementation into the config.
                kwargs["attn_implementation"] = getattr(config, "_attn_implementation_internal", None)
        base_kwargs = {key: kwargs.pop(key) for key in BASE_KWARGS if kwargs.get(key) is not None}
        for key in list(kwargs):
            if key in _IGNORED_KWARGS or key in BASE_KWARGS:
                kwargs.pop(key)
            elif hasattr(loaded, key):
                setattr(loaded, key, kwargs.pop(key))
        if kwargs or model_args:
            raise TypeError(f"from_pretrained() got unexpected arguments: {[*model_args, *kwargs]}.")
        if dtype is None or dtype == "auto":
            dtype = loaded.dtype or torch.float32

        prompts = loaded.class_prompts()
        shared = base_model if isinstance(base_model, PreTrainedModel) else None
        text_source = None  # a loaded model to make the base classifier with
        if shared is not None and has_text_tower(shared):
            text_source = shared
        elif shared is not None:
            check_same_base(shared, loaded)
            base_model = None
        base_name = trusted_base_name(loaded, base_model, local)
        pinned = base_revision or (loaded.base_model_revision if base_model is None else None)
        base = table = kept = None
        if text_source is None:
            kept = cached_table_path(base_name, pinned, prompts, loaded.prompt_average)
            table = None if text_tower or set(base_kwargs) - {"attn_implementation"} else read_table(kept)
        if table is not None and _matches(table, prompts, loaded):
            base = shared or load_image_tower(
                base_name, revision=pinned, dtype=torch_dtype(dtype), hub_kwargs=hub,
                attn_implementation=base_kwargs.get("attn_implementation"),
            )  # fmt: skip
        if base is None or table is None:
            if text_source is not None:
                base, commit, target = text_source.train(False).requires_grad_(False), None, text_source.dtype
            else:
                base, commit, target = load_base_fp32(
                    base_name, pinned, dtype, base_trust_remote_code, hub, base_kwargs
                )
            tokenizer = load_tokenizer(base_name, revision=commit, **hub)
            table = base_embeddings(base, tokenizer, prompts, loaded.prompt_average)
            if not accept_base_mismatch:
                check_fingerprint(table, prompts, loaded.prompt_average, loaded.base_fingerprint or {}, base_name)
            elif table.shape[1] != residual.shape[1]:
                raise ArtifactError(
                    f"The residual is {list(residual.shape)}, the base {base_name!r} gives {list(table.shape)}: they "
                    "can never fit. Choose a base with the same embedding size."
                )
            write_table(kept, table)
            base.to(target) if base.dtype != target else None  # type: ignore[arg-type]
            base = shared or base
        loaded.dtype = base.dtype
        loaded.architectures = [cls.__name__]
        model = cls(loaded, base, table)
        with torch.no_grad():
            model.classifier.residual.copy_(residual)
        model.classifier.shift = shift
        model._processor_source = (
            name,
            {**hub, "revision": revision, **({"subfolder": subfolder} if subfolder else {})},
        )
        model._base_source = (base_name, {**hub, "revision": pinned})
        model.config._name_or_path = name
        _place_head(model).train(False)
        if output_loading_info:
            return model, {
                "missing_keys": set(),
                "unexpected_keys": set(),
                "mismatched_keys": set(),
                "error_msgs": [],
            }
        return model

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
            labels: [N] class ids; adds the mean cross-entropy as `loss`.
            **kwargs: what else the base's image tower takes (`pixel_attention_mask`, `spatial_shapes`,
                `interpolate_pos_encoding`); `num_items_in_batch` from `transformers.Trainer` scales the loss.

        Returns:
            `ImageClassifierOutput` with `logits` [N, K] fp32; a tuple if `return_dict` is False.

        Raises:
            ConfigurationError: both or neither of pixel values and embeddings, a wrong embedding size, or a label
                outside the classes.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ConfigurationError("Pass either pixel_values or image_embeds; got both or neither.")
        features = None
        if image_embeds is None:
            wanted = ("pixel_attention_mask", "spatial_shapes", "interpolate_pos_encoding")
            options: dict[str, Any] = {key: kwargs[key] for key in wanted[2:] if kwargs.get(key)}
            if output_attentions:
                options["output_attentions"] = True
            if output_hidden_states:
                options["output_hidden_states"] = True
            inputs = {"pixel_values": pixel_values, **{key: kwargs.get(key) for key in wanted[:2]}}
            with torch.no_grad():
                features = image_features(self.clip, inputs, **options)
            image_embeds = pooled(features)
        elif image_embeds.shape[-1] != self.config.projection_dim:
            raise ConfigurationError(
                f"image_embeds must have {self.config.projection_dim} columns, the base's projection size; got "
                f"{tuple(image_embeds.shape)}. Use the projected features of {self.config.base_model_name_or_path}."
            )
        logits = self.classifier(image_embeds)
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels, kwargs.get("num_items_in_batch"))
        output = ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(features, "hidden_states", None) if output_hidden_states else None,
            attentions=getattr(features, "attentions", None) if output_attentions else None,
        )
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return output if return_dict else output.to_tuple()

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Any) -> Tensor:
        labels = labels.to(logits.device)
        if labels.device.type == "cpu" and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= logits.shape[-1]:
                raise ConfigurationError(
                    f"Labels must be class ids from 0 to {logits.shape[-1] - 1}; got {low if low < 0 else high}. "
                    "Check that the dataset has the model's classes in the model's order."
                )
        if num_items is None:
            return F.cross_entropy(logits, labels)
        total: Tensor = F.cross_entropy(logits, labels, reduction="sum") / num_items
        return total

    def zero_shot_logits(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> Tensor:
        """Logits [N, K] of the base classifier alone; arguments as in `forward`."""
        if image_embeds is None:
            image_embeds = self.get_image_features(pixel_values=pixel_values)
        return self.classifier.zero_shot_logits(image_embeds)

    def use_classifier(self, other: TaskResCLIPForImageClassification) -> None:
        """Serve another task over the same backbone, from now on: its head and config take the place of these.

        Raises:
            ConfigurationError: the other model was made for another base.
        """
        ours, theirs = self.config, other.config
        for name in ("base_model_name_or_path", "base_model_revision", "projection_dim"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ConfigurationError(
                    f"The classifiers have different bases: {name} is {getattr(ours, name)!r} here and "
                    f"{getattr(theirs, name)!r} there."
                )
        self.classifier, self.config = other.classifier, theirs

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor | None, **kwargs: Any) -> Tensor:
        """Image embeddings [N, D] of the frozen base, projected and not normalised."""
        return pooled(image_features(self.clip, {"pixel_values": pixel_values, **kwargs}))

    def init_weights(self) -> None:
        """Nothing to do: the residual starts at zero and the base comes with its weights, which must not be touched."""

    def train(self, mode: bool = True) -> TaskResCLIPForImageClassification:
        """Switch the head's mode; the base stays in eval mode (dropout and batch statistics off)."""
        super().train(mode)
        if hasattr(self, "clip"):
            self.clip.eval()
        return self

    @property
    def class_names(self) -> list[str]:
        """Class names in label order."""
        return self.config.class_names

    def class_prompts(self) -> list[list[str]]:
        """The prompts of each class, K lists."""
        return self.config.class_prompts()

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer; loaded when first needed."""
        if self._tokenizer is None:
            if self._base_source is None:
                raise ConfigurationError("The base model has no name to find its tokenizer by: pass tokenizer=.")
            name, options = self._base_source
            self._tokenizer = load_tokenizer(name, **options)
        return self._tokenizer

    @property
    def image_processor(self) -> Any:
        """The image processor pictures must go through; loaded when first needed."""
        if self._image_processor is None:
            if self._processor_source is None:
                raise ConfigurationError(
                    "The base model has no name to find its image processor by: set image_processor."
                )
            name, options = self._processor_source
            # Without torchvision the default would only warn before it takes the PIL one.
            backend = {} if is_torchvision_available() else {"backend": "pil"}
            self._image_processor = AutoImageProcessor.from_pretrained(name, **backend, **options)
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
            include_code: add the modules that `trust_remote_code=True` needs where the library is not installed.
            **kwargs: passed to `push_to_hub`; sizes of shards and the like are accepted and ignored.

        Raises:
            ArtifactError: the residual is not finite or the folder cannot be written; the old artifact stays.
        """
        if residual_dtype not in (torch.float32, torch.float16):
            raise ConfigurationError(f"`residual_dtype` must be torch.float32 or torch.float16; got {residual_dtype}.")
        if is_main_process:
            state = state_dict or {}
            residual = state.get(f"classifier.{RESIDUAL}", state.get(RESIDUAL, self.classifier.residual))
            extra = {name: content for name, content in self._side_files(include_code).items() if content is not None}
            values = self._config_values(with_code=any(name.endswith(".py") for name in extra))
            card = _card(values, kwargs.get("repo_id"), kwargs.get("tags"), Path(save_directory) / "README.md")
            if card is not None:
                extra["README.md"] = card
            shift = self.classifier.shift
            shift = None if shift is None else shift.to(residual_dtype)
            write_artifact(save_directory, values, residual.detach().to(residual_dtype), extra, shift)
        if push_to_hub:
            kept = (
                "token",
                "private",
                "revision",
                "create_pr",
                "commit_message",
                "commit_description",
                "tags",
            )
            repo_id = kwargs.get("repo_id") or Path(save_directory).name
            self.push_to_hub(
                repo_id, **{key: kwargs[key] for key in kept if key in kwargs}, residual_dtype=residual_dtype
            )

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
        tags: list[str] | None = None,
        residual_dtype: torch.dtype = torch.float32,
        include_code: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Upload the artifact (kilobytes) in one commit; arguments as in `PreTrainedModel.push_to_hub`.

        A base that is a folder of this machine is named by its last part only: whoever loads the artifact must then
        pass `base_model=`.

        Returns:
            `huggingface_hub.CommitInfo`.
        """
        try:
            from .hub import upload
        except ImportError as error:
            raise ConfigurationError("Uploading needs the library itself: pip install taskres_hf.") from error
        original = self.config.base_model_name_or_path
        if original is not None and os.path.isdir(original):
            warnings.warn(
                f"The base model is a folder of this machine, which the Hub cannot name: {Path(original).name!r} is "
                "recorded, and loading will need base_model=. Load the base from the Hub to avoid this.",
                stacklevel=2,
            )
            self.config.base_model_name_or_path = Path(original).name
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(
                    folder,
                    residual_dtype=residual_dtype,
                    include_code=include_code,
                    repo_id=repo_id,
                    tags=tags,
                )
                return upload(
                    folder,
                    repo_id,
                    token=token,
                    private=private,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message,
                    commit_description=commit_description,
                )
        finally:
            self.config.base_model_name_or_path = original

    def _config_values(self, with_code: bool) -> dict[str, Any]:
        self.config.alpha = self.classifier.alpha
        self.config.library_versions = library_versions()
        self.config.architectures = [type(self).__name__]
        self.config.dtype = self.clip.dtype
        values: dict[str, Any] = self.config.to_diff_dict()
        values["id2label"] = {str(key): value for key, value in (self.config.id2label or {}).items()}
        values["dtype"] = str(self.clip.dtype).removeprefix("torch.")
        values.pop("auto_map", None)
        if with_code:
            values["auto_map"] = {
                "AutoConfig": "configuration_taskres.TaskResConfig",
                "AutoModelForImageClassification": f"modeling_taskres.{type(self).__name__}",
            }
        return values

    def _side_files(self, include_code: bool) -> dict[str, bytes | None]:
        """The image processor's config, and the modules for `trust_remote_code` on request."""
        files: dict[str, bytes | None] = {}
        if self._image_processor is not None or self._processor_source is not None:
            with tempfile.TemporaryDirectory() as folder:
                self.image_processor.save_pretrained(folder)
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        if include_code or getattr(self, "_auto_class", None) is not None:
            here = Path(__file__).parent
            for name in REMOTE_CODE_FILES:
                files[name] = (here / name).read_bytes()
        return files


# Everything this file imports, for trust_remote_code without the library: transformers, torch and safetensors only.
REMOTE_CODE_FILES = (
    "errors.py",
    "storage.py",
    "prompts.py",
    "residual.py",
    "configuration_taskres.py",
    "families.py",
    "encoders.py",
    "base_model.py",
    "base_classifier.py",
    "artifact.py",
    "modeling_taskres.py",
)


def _rename_residual(module: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Files name the tensor `residual`; the module tree calls it `classifier.residual` (Trainer resumes this way)."""
    if f"{prefix}{RESIDUAL}" in state_dict:
        state_dict[f"{prefix}classifier.{RESIDUAL}"] = state_dict.pop(f"{prefix}{RESIDUAL}")


def _matches(table: Tensor, prompts: Sequence[Sequence[str]], config: TaskResConfig) -> bool:
    """Whether a kept base classifier is the one the residual was trained on; if not, it is made anew."""
    try:
        check_fingerprint(table, prompts, config.prompt_average, config.base_fingerprint or {}, "")
    except BaseMismatchError:
        return False
    return True


def _place_head(model: TaskResCLIPForImageClassification) -> TaskResCLIPForImageClassification:
    device = model.clip.device
    if device.type != "meta":
        model.classifier.to(device)
    return model


def _card(values: dict[str, Any], repo_id: str | None, tags: list[str] | None, existing: Path) -> bytes | None:
    try:
        from .hub import keep_written_card, model_card
    except ImportError:  # running as remote code: the card stays as downloaded
        return None
    if existing.is_file() and keep_written_card(existing.read_text(encoding="utf-8", errors="replace")):
        return None
    return model_card(values, repo_id, tags).encode("utf-8")
