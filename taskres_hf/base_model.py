"""Loading a base: fp32 first, its commit pinned, its towers apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file, extract_commit_hash

from .errors import BaseModelError, ConfigurationError
from .families import FAMILIES, family_of

_HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


BASE_KWARGS = ("device_map", "attn_implementation", "max_memory", "offload_folder", "quantization_config")


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: Any = None,
    hub_kwargs: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> tuple[PreTrainedModel, str | None]:
    """Load a dual encoder, frozen and in eval mode.

    Args:
        name_or_path: Hub id or folder.
        revision: branch, tag or commit; the commit it resolves to is returned.
        dtype: dtype of the weights, or `"auto"` for the checkpoint's own.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `proxies`, `subfolder`.

    Returns:
        The model, and the commit it came from (None for a folder).

    Raises:
        BaseModelError: not a dual encoder in `FAMILIES`, found before any weight is read.
        OSError: not found or not reachable, as raised by the Hub client.
    """
    hub = dict(hub_kwargs or {})
    path = cached_file(name_or_path, "config.json", revision=revision, **hub)
    commit = None if Path(name_or_path).is_dir() else extract_commit_hash(path, None)
    hub["revision"] = commit or revision  # every further file comes from the same commit
    family_of(AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub))
    for key, value in (("attn_implementation", attn_implementation), ("device_map", device_map)):
        if value is not None:
            model_kwargs[key] = value
    model = AutoModel.from_pretrained(
        name_or_path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        **hub,
        **model_kwargs,
    )
    for method in ("get_text_features", "get_image_features"):
        if not callable(getattr(model, method, None)):
            raise BaseModelError(f"The base model {name_or_path!r} ({type(model).__name__}) has no `{method}`.")
    return model.eval().requires_grad_(False), commit


class TextTowerNotLoaded(nn.Module):
    """Stands where the text tower would be: it is not needed once the base classifier is known."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            raise BaseModelError(
                "The text tower was not loaded: classifying needs the image tower alone. Load the model with "
                "from_pretrained(..., text_tower=True) to use it."
            ) from None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.missing


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


def load_image_tower(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    hub_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel | None:
    """The base without its text tower, its weights mapped from the file instead of read.

    Returns:
        The base, frozen and in eval mode; None where the checkpoint is not one safetensors file with exactly the
        weights the image side needs, and `load_base` must be used.
    """
    hub = dict(hub_kwargs or {})
    try:
        config_path = cached_file(name_or_path, "config.json", revision=revision, **hub)
        path = cached_file(name_or_path, "model.safetensors", revision=revision, **hub)
    except OSError:
        return None
    kept = _config_of_split_towers(Path(str(config_path)).read_text(encoding="utf-8"))
    if kept is None:
        return None
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
    with safe_open(str(path), framework="pt") as stream:
        stored = set(stream.keys())
        for prefix, module in base.named_modules():  # several times faster than load_state_dict(assign=True)
            vars(module)["training"] = False
            for leaf, parameter in module._parameters.items():
                name = f"{prefix}.{leaf}" if prefix else leaf
                if parameter is not None and name not in stored:
                    return None
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(stream.get_tensor(name).to(dtype), requires_grad=False)
    for name, buffer in list(base.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                return None
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            base.get_submodule(owner).register_buffer(leaf, positions, persistent=False)
    base.config._name_or_path = name_or_path
    base.config._commit_hash = None if Path(name_or_path).is_dir() else extract_commit_hash(path, None)
    whole: PreTrainedModel = base
    return whole


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


def load_tokenizer(name_or_path: str, *, revision: str | None = None, **hub_kwargs: Any) -> Any:
    """The base's tokenizer; keyword arguments as in `AutoTokenizer.from_pretrained`."""
    return AutoTokenizer.from_pretrained(name_or_path, revision=revision, **hub_kwargs)


def load_base_fp32(
    name: str,
    revision: str | None,
    dtype: Any,
    trust_remote_code: bool,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[PreTrainedModel, str | None, torch.dtype]:
    """The base in fp32, so that `t` does not depend on the dtype it will run in, and that dtype."""
    dtype = dtype if dtype == "auto" else torch_dtype(dtype)
    placed = "device_map" in kwargs or "quantization_config" in kwargs
    first = dtype if dtype == "auto" or placed else torch.float32
    base, commit = load_base(
        name, revision=revision, dtype=first, trust_remote_code=trust_remote_code, hub_kwargs=hub, **kwargs
    )
    target = base.dtype if dtype == "auto" or placed else dtype
    if not placed:
        base.float()
    return base, commit, target


def torch_dtype(dtype: Any) -> torch.dtype:
    """A torch dtype or its name, as a torch dtype."""
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if not isinstance(dtype, torch.dtype):
        raise ConfigurationError(f"`dtype` must be a torch dtype or 'auto'; got {dtype!r}.")
    return dtype


def split_kwargs(kwargs: dict[str, Any], separate_hub_only: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes to the Hub client, and the rest."""
    hub = {key: kwargs[key] for key in _HUB_KWARGS if kwargs.get(key) is not None}
    rest = {key: value for key, value in kwargs.items() if key not in _HUB_KWARGS}
    if not separate_hub_only:
        unknown = [key for key in rest if key not in (*BASE_KWARGS, "low_cpu_mem_usage", "subfolder")]
        if unknown:
            raise TypeError(f"from_base() got unexpected arguments: {unknown}.")
        rest = {key: value for key, value in rest.items() if value is not None and key != "low_cpu_mem_usage"}
    return hub, rest


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively (AVX-512 BF16 or AMX)."""
    for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        probe = getattr(torch.cpu, test, None)
        if probe is not None and probe():
            return True
    return False
