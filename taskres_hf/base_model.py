"""Loading a base: what it is, fp32 first, its commit pinned, its towers apart."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import extract_commit_hash

from .encoders import (
    FAMILIES,
    OPEN_CLIP,
    BaseSource,
    config_file,
    content_of,
    family_of,
    other_format,
    read_config,
    score_parameters,
)
from .errors import (
    BaseModelError,
    ConfigurationError,
    MissingExtraError,
    TextTowerNotLoadedError,
)
from .machine import speed_of
from .openclip import CONFIG_FILE, load_open_clip

# What has both towers and still is no base, by `model_type`.
_NO_SINGLE_EMBEDDING = {
    "blip-2": "Its score of a picture is the best of 32 embeddings, so no row of a linear classifier gives it.",
}
_OWN_CODE = (
    "has code of its own (auto_map in its config.json), which runs only if you say so. If you trust it, pass "
    "trust_remote_code=True to from_base (--trust-remote-code), base_trust_remote_code=True to from_pretrained."
)
_IMAGE_ALONE = "TaskResForImageClassification.from_base learns on such a model without any text."
_TEXT_ALONE = "TaskResForSequenceClassification.from_base classifies texts with it."
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SLOWER = 0.8  # of fp32's speed, below which a dtype only costs


def load_base(
    source: BaseSource, dtype: torch.dtype | str = torch.float32, **model_kwargs: Any
) -> tuple[PreTrainedModel, str | None]:
    """Load a dual encoder, frozen and in eval mode.

    Args:
        source: where from; a branch or tag is resolved to a commit, which is returned.
        dtype: dtype of the weights, or `"auto"` for the checkpoint's own.
        **model_kwargs: `device_map`, `attn_implementation`, `quantization_config` and so on.

    Returns:
        The model, and the commit it came from (None for a folder).

    Raises:
        BaseModelError: no dual encoder in `FAMILIES` (found before any weight is read), no safetensors weights, weights
            missing, damaged or not finite.
        MissingExtraError: a package that an option needs is not installed.
        HubError: not found, not to be read or not reachable; says what to do.
    """
    path = config_file(source)
    commit = None if os.path.isdir(source.name) else extract_commit_hash(path, None)
    _check_model_type(source, path)
    model: Any
    missing: list[str]
    if os.path.basename(path) == CONFIG_FILE:
        model, missing = load_open_clip(source, commit, dtype, model_kwargs), []
    else:
        model, missing = from_files(source, commit, AutoModel, dtype, model_kwargs, family_of)
    if missing:
        raise BaseModelError(
            f"The base model {source.name!r} lacks {len(missing)} weights, such as {missing[0]}: transformers would "
            "fill them with random numbers. Is only one tower saved there? Give a checkpoint with both."
        )
    for method in ("get_text_features", "get_image_features"):
        if not callable(getattr(model, method, None)):
            raise BaseModelError(f"The base model {source.name!r} ({type(model).__name__}) has no `{method}`.")
    check_weights(model, source.name)
    return model.eval().requires_grad_(False), commit


def from_files(
    source: BaseSource,
    commit: str | None,
    auto: Any,
    dtype: Any,
    options: Mapping[str, Any],
    check: Callable[[Any], Any],
) -> tuple[PreTrainedModel, list[str]]:
    """A model as transformers loads it from safetensors, and the weights that its files lack.

    Args:
        commit: what every file comes from; None where `source.revision` says it. auto: `AutoModel` or another.
        check: is given the config before any weight is read.

    Raises:
        BaseModelError, MissingExtraError, HubError: see `load_base`.
    """
    at = {**source.hub, "revision": commit or source.revision, "trust_remote_code": source.trust_remote_code}
    try:
        with source.asking():
            config = AutoConfig.from_pretrained(source.name, **at)
            check(config)
            if isinstance(getattr(config, "model_args", None), dict):
                config.model_args.pop("num_classes", None)  # timm writes it there too, and transformers gives it itself
                options = {**options, "config": config}
            model, notes = auto.from_pretrained(
                source.name, dtype=dtype, use_safetensors=True, output_loading_info=True, **at, **options
            )
    except ImportError as error:
        raise MissingExtraError(f"The base model {source.name!r} cannot be loaded this way: {error}") from error
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:  # torch asserts a device
        reason = _why_not(source, error)
        if reason is None:
            raise
        raise BaseModelError(reason) from error
    return model, sorted(notes["missing_keys"])


def check_weights(base: PreTrainedModel, name: str) -> None:
    """Refuse a base that holds a NaN, or a dtype that nothing here is made for.

    Raises:
        BaseModelError: names the weight.
    """
    for key, weight in base.named_parameters():
        if weight.is_meta or not weight.is_floating_point():
            continue
        if weight.dtype == torch.float64:
            raise BaseModelError(f"The base model {name!r} is in float64: load it with dtype=torch.float32.")
        # The sum is several times faster; only where it is not finite is each element looked at.
        if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
            raise BaseModelError(
                f"The base model {name!r} holds NaN or infinite values in {key}: the checkpoint is damaged, or its "
                "dtype too narrow. Download it again, or load it with dtype=torch.float32."
            )


class TextTowerNotLoaded(nn.Module):
    """Stands where the text tower would be: it is not needed once the base classifier is known."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise _text_tower_not_loaded() from None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _text_tower_not_loaded()


def _text_tower_not_loaded() -> TextTowerNotLoadedError:
    return TextTowerNotLoadedError(
        "The text tower was not loaded: classifying needs the image tower alone. Load the model with "
        "from_pretrained(..., text_tower=True) to use it."
    )


def has_text_tower(base: PreTrainedModel) -> bool:
    """Whether text can be embedded with a base."""
    return not any(isinstance(module, TextTowerNotLoaded) for module in base.children())


def check_same_base(base: PreTrainedModel, config: Any) -> None:
    """Whether a base without its text tower, whose text embeddings cannot be compared, is the artifact's.

    Raises:
        BaseModelError: it has another name or commit.
    """
    name, wanted = base.config._name_or_path, str(config.base_model_name_or_path)
    commit = getattr(base.config, "_commit_hash", None)
    if name != wanted or (config.base_model_revision or commit) != commit:
        raise BaseModelError(
            f"The base given is {name!r} without its text tower, so it cannot be told whether it is {wanted!r}, which "
            "the artifact was made for. Load the base with text_tower=True."
        )


_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")


def image_settings(config: Any) -> dict[str, Any]:
    """What decides an image tower's embeddings and shows in no weight: activation, epsilon and heads, if it has."""
    values = ((key, getattr(getattr(config, "vision_config", config), key, None)) for key in _SETTINGS)
    return {key: value for key, value in values if isinstance(value, (str, int, float))}


class ImageSide(NamedTuple):
    """A base without its text tower; `weights` and `score` (logit scale and bias) are those of its file, unrounded."""

    base: PreTrainedModel
    weights: dict[str, Tensor]
    score: tuple[float, float]


def load_image_tower(
    source: BaseSource, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> ImageSide | None:
    """The base without its text tower, its weights mapped from the file instead of read.

    Returns:
        The base, frozen and in eval mode, with its weights and score as stored; None where the checkpoint is not
        one safetensors file with exactly the weights the image side needs, and `load_base` must be used.
    """
    config_path, path = config_file(source), source.file("model.safetensors")
    kept = None if path is None else _config_of_split_towers(Path(config_path).read_text("utf-8"))
    if kept is None:
        return None
    try:
        base = _empty_base(kept, dtype, attn_implementation)
    except (ValueError, ImportError):  # an attention that is not there: `load_base` says so
        return None
    stored = {}
    with safe_open(str(path), framework="pt") as stream:
        names = set(stream.keys())
        for prefix, module in base.named_modules():  # several times faster than load_state_dict(assign=True)
            vars(module)["training"] = False
            for leaf, parameter in module._parameters.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if parameter is not None and name not in names:
                    return None
                if parameter is not None:
                    stored[name] = stream.get_tensor(name)
                    if stored[name].shape != parameter.shape or not stored[name].is_floating_point():
                        return None
                    exact = torch.float32 if module is base else dtype  # the logit's scale and bias, rounded below
                    module._parameters[leaf] = nn.Parameter(stored[name].to(exact), requires_grad=False)
    for name, buffer in list(base.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                return None
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            base.get_submodule(owner).register_buffer(leaf, positions, persistent=False)
    base.config._name_or_path = source.name
    base.config._commit_hash = None if os.path.isdir(source.name) else extract_commit_hash(path, None)
    score = score_parameters(base)
    for leaf, parameter in base._parameters.items():
        if parameter is not None:
            base._parameters[leaf] = nn.Parameter(parameter.to(dtype), requires_grad=False)
    return ImageSide(base, stored, score)


def _empty_base(kept: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None) -> Any:
    """A base of a config whose image side has shapes and no weights, and whose text side is not there."""
    config = copy.deepcopy(kept)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    text_layers, layers = config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers
    config.text_config.num_hidden_layers = 0  # the text side is built and thrown away
    config.vision_config.num_hidden_layers = 1  # and copying an empty layer costs a fraction of building one
    with torch.device("meta"), no_init_weights():
        base = AutoModel.from_config(config, dtype=dtype, **options)
    base.config.text_config.num_hidden_layers = text_layers
    base.config.vision_config.num_hidden_layers = layers
    stack = base.vision_model.encoder.layers
    stack.extend(_copied(stack[0]) for _ in range(layers - 1))
    for attribute in family_of(config).text_modules:
        setattr(base, attribute, TextTowerNotLoaded())
    return base


@lru_cache(maxsize=16)
def _config_of_split_towers(text: str) -> PreTrainedConfig | None:
    """The config in a file's text, or None if its towers cannot be loaded separately; making one takes milliseconds."""
    values = json.loads(text)
    family = FAMILIES.get(values.get("model_type"))
    if family is None or not family.text_modules or "auto_map" in values:
        return None
    return AutoConfig.for_model(**values)


def _copied(module: nn.Module) -> nn.Module:
    """A copy with the same empty parameters, and hooks, buffers and children of its own."""
    clone = copy.copy(module)
    vars(clone).update({name: value.copy() for name, value in vars(module).items() if isinstance(value, dict | set)})
    clone._modules = {name: child and _copied(child) for name, child in module._modules.items()}
    return clone


def load_base_fp32(
    source: BaseSource, dtype: Any, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, str | None, torch.dtype]:
    """The base in fp32, so that `t` does not depend on the dtype it will run in; its commit; and that dtype.

    With a `device_map` or quantization the base comes in the dtype it will run in: see `unrounded_text_side`.
    """
    dtype = dtype if dtype == "auto" else torch_dtype(dtype)
    placed = "device_map" in options or "quantization_config" in options
    first = dtype if dtype == "auto" or placed else torch.float32
    base, commit = load_base(source, first, **options)
    target = base.dtype if dtype == "auto" or placed else dtype
    if not placed:
        base.float()
    return base, commit, target


def unrounded_text_side(base: PreTrainedModel, source: BaseSource | None) -> tuple[Any, str]:
    """A model in fp32 whose text side is that of `base`, and the dtype its weights were rounded to.

    A base in bf16, fp16 or int8 gives other text embeddings than the same checkpoint in fp32. So they are made with
    the checkpoint itself, read once more in fp32, if it holds the weights of `base`; else (the base was changed in
    memory, or its files are gone) with an fp32 copy of its text side.

    Raises:
        BaseModelError: the base has no text tower, and its files are not there.
    """
    weights = [weight for name, weight in base.named_parameters() if not name.startswith(("logit_", "temperature"))]
    exact = all(weight.dtype == torch.float32 and not weight.is_meta for weight in weights)
    if has_text_tower(base) and exact:
        return base, "float32"
    if source is not None and source.name:
        try:
            whole, _ = load_base(source)
        except (OSError, BaseModelError):
            if not has_text_tower(base):
                raise
        else:
            if _rounded_equal(base, whole):
                return whole, "float32"
            del whole
    if not has_text_tower(base):
        raise _text_tower_not_loaded()
    clone = copy.copy(base)
    clone._modules = {
        name: _in_fp32(child) if name.startswith("text_") and child is not None else child
        for name, child in base._modules.items()
    }
    return clone, str(base.dtype).removeprefix("torch.")


def _in_fp32(module: nn.Module) -> nn.Module:
    from accelerate.hooks import remove_hook_from_module

    clone: nn.Module = remove_hook_from_module(copy.deepcopy(module), recurse=True)
    return clone.float()


def _rounded_equal(base: PreTrainedModel, whole: PreTrainedModel) -> bool:
    """Whether the weights of `base` are those of `whole`, rounded; quantized and offloaded ones are not compared."""
    exact = dict(whole.named_parameters())
    for name, weight in base.named_parameters():
        if weight.is_meta or weight.dtype not in _DTYPES:
            continue
        if name not in exact or exact[name].shape != weight.shape:
            return False
        if not torch.equal(exact[name].to(weight.dtype), weight.cpu()):
            return False
    return True


def check_tokens(base: PreTrainedModel, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    """Whether a tokenizer fits a base: it tells texts apart, and knows no token that the base does not.

    Raises:
        BaseModelError: most different texts become the same tokens, or an id is beyond the base's vocabulary.
    """
    different, told_apart = len({text.casefold() for text in texts}), len({tuple(row) for row in ids})
    words, tokens = {word for text in texts for word in text.split()}, {token for row in ids for token in row}
    few = len(tokens) <= len(words) / 2 and (told_apart < different or len(tokens) <= 3)  # start, end, unknown
    if different > 1 and (told_apart <= different / 2 or few):
        raise BaseModelError(
            f"The tokenizer makes the same tokens of different words ({len(tokens)} tokens of {len(words)} words), "
            f"as in {texts[0]!r}: its vocabulary is missing or is another language's. Check the tokenizer's files "
            "of the base model, or pass tokenizer=."
        )
    text_config = getattr(base.config, "text_config", base.config)
    known = getattr(text_config, "vocab_size", None)
    largest = max((max(row, default=0) for row in ids), default=0)
    if known is not None and largest >= known:
        raise BaseModelError(
            f"The tokenizer gives the token {largest}, the base's vocabulary has {known}: it belongs to another model. "
            "Copy the tokenizer's files of this base, or pass tokenizer=."
        )


def torch_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype that a base can run in, or its name, as a torch dtype."""
    known = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if known not in _DTYPES:
        raise ConfigurationError(
            f"`dtype` must be torch.float32, torch.bfloat16, torch.float16 or 'auto'; got {dtype!r}."
        )
    return known  # type: ignore[no-any-return]


def advise_on_dtype(base: PreTrainedModel) -> None:
    """Warn of a dtype that this processor multiplies more slowly than fp32, as it was measured."""
    if base.dtype == torch.float32 or base.device.type != "cpu":
        return
    speed = speed_of(base.dtype)
    if speed < _SLOWER:
        warnings.warn(
            f"The base runs in {str(base.dtype).removeprefix('torch.')}, which this processor multiplies at "
            f"{speed:.1g} times the speed of fp32. Pass dtype=torch.float32.",
            stacklevel=3,
        )


# ---------------------------------------------------------------------- what it is, and what is none


def _check_model_type(source: BaseSource, path: str) -> None:
    """Say what a model is that is no dual encoder, or one with code of its own that nobody said to trust.

    Raises:
        BaseModelError: with what it is and what to give instead.
    """
    name, config = source.name, read_config(source, path)
    kind = config.get("model_type")
    if os.path.basename(path) == CONFIG_FILE:
        return
    if kind in FAMILIES:
        if "auto_map" in config:
            check_own_code(source)
        return
    advice = "Give the whole model, with both towers."
    if kind in _NO_SINGLE_EMBEDDING:
        what, advice = "a model of images and text", _NO_SINGLE_EMBEDDING[kind]
    elif kind == "taskres":
        what, advice = "a saved TaskRes classifier", "Load it with from_pretrained, or give its own base model."
    elif "model_cfg" in config:
        what, advice = "an open_clip checkpoint", OPEN_CLIP
    elif "_class_name" in config or "_diffusers_version" in config:
        what = "a part of a diffusers pipeline"
    elif kind is None:
        what = "a timm model" if "pretrained_cfg" in config else "of no known kind: its config.json has no model_type"
    elif {"vision_config", "text_config"} <= set(config):
        what, advice = "a model of images and text of another family", "To add it: taskres_hf.encoders.register_family."
    elif "vision" in str(kind) or {"image_size", "num_channels", "patch_size"} & set(config):
        what, advice = "an image model alone", f"{_IMAGE_ALONE} {advice}"
    elif "text" in str(kind) or "vocab_size" in config:
        what, advice = "a text-only model", f"{_TEXT_ALONE} {advice}"
    else:
        what = "another kind of model"
    raise BaseModelError(
        f"The base model {name!r} is {what} (model_type {kind!r}); needed is a dual encoder, images and text in one "
        f"space. {advice} Supported model types: {', '.join(sorted(FAMILIES))}."
    )


def check_own_code(source: BaseSource) -> None:
    """Refuse to run the code that a base brings, unless its user said so."""
    if not source.trust_remote_code:
        raise BaseModelError(f"The base model {source.name!r} {_OWN_CODE}")


def _why_not(source: BaseSource, error: Exception) -> str | None:
    """What to say instead of an error of transformers; None where that error says it best."""
    if isinstance(error, BaseModelError | torch.OutOfMemoryError):
        return None
    weights = ("model.safetensors", "model.safetensors.index.json")
    if isinstance(error, OSError) and all(source.file(file) is None for file in weights):
        pickle = next((file for file in _PICKLES if source.file(file) is not None), None)
        if pickle is not None:
            return (
                f"The base model {source.name!r} has its weights in {pickle} only, which can run code when opened and "
                "is not read here. If you trust it, convert it once: AutoModel.from_pretrained(NAME).save_pretrained("
                "FOLDER) with transformers, copy the tokenizer and image processor files, and give that folder."
            )
        other = other_format(source)
        if other is not None or os.path.isdir(source.name):
            return other or f"The base model {source.name!r} has no model.safetensors; {content_of(source)}."
        return None
    if isinstance(error, OSError) and not os.path.isdir(source.name):
        return None
    return f"The base model {source.name!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
