"""From prompts to the base classifier `t` [K, D]: made in fp32, cached, and checked against what a residual expects."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .base_formats import BaseSource
from .base_model import (
    check_same_base,
    check_tokens,
    check_weights,
    has_text_tower,
    load_base_fp32,
    load_image_tower,
    load_tokenizer,
    torch_dtype,
    unrounded_text_side,
)
from .encoders import encode_texts, score_parameters, text_length
from .errors import ArtifactError, BaseMismatchError, BaseModelError, ConfigurationError
from .families import family_of
from .fingerprint import check_fingerprint, fingerprint, image_sketch
from .fingerprint import same_base as same_base
from .prompts import prompts_digest, warn_of_equals
from .storage import cache_root, read_tensors, write_tensors


def base_embeddings(
    base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[str]], average: str = "raw"
) -> Tensor:
    """The base classifier: one raw text embedding per class, averaged over its prompts.

    Args:
        prompts: K lists of prompts, from `prompts.class_prompts`.
        average: `"raw"` averages the embeddings as they come (published TaskRes); `"normalized"` gives every prompt
            unit length first, as CLIP's own ensembles do, and the mean the average raw length, so that `alpha` and
            the learning rate keep their meaning.

    Returns:
        `t` [K, D] fp32 on the CPU, not normalised.

    Raises:
        ConfigurationError: unknown `average`.
        BaseModelError: the text tower gives NaN, or the same embedding for all classes.
    """
    if average not in ("raw", "normalized"):
        raise ConfigurationError(f"`prompt_average` must be 'raw' or 'normalized'; got {average!r}.")
    flat = [prompt for group in prompts for prompt in group]
    embeddings = encode_texts(base, tokenizer, flat)
    rows = []
    for group in embeddings.split([len(group) for group in prompts]):
        if average == "raw":
            rows.append(group.mean(dim=0))
        else:
            direction = F.normalize(F.normalize(group, dim=-1).mean(dim=0), dim=-1)
            rows.append(direction * group.norm(dim=-1).mean())
    table = torch.stack(rows)
    if not bool(torch.isfinite(table).all()):
        raise BaseModelError("The base's text tower gives NaN or infinite values: its weights are damaged.")
    if len(set(flat)) > 1 and bool((embeddings - embeddings[0]).abs().max() <= 1e-6 * embeddings.abs().max()):
        raise BaseModelError(
            "The base's text tower gives the same embedding for every prompt: the tokenizer does not fit it (its "
            "special tokens are others), or the tower was never trained. Check the tokenizer's files of the base model."
        )
    return table


class PreparedBase(NamedTuple):
    """A base ready to classify: the model in the dtype it runs in, `t` [K, D], its fingerprint, where it came from."""

    base: PreTrainedModel
    table: Tensor
    fingerprint: dict[str, Any]
    source: BaseSource


def base_for_classes(
    base_model: PreTrainedModel | None,
    source: BaseSource,
    dtype: Any,
    options: Mapping[str, Any],
    prompts: Sequence[Sequence[str]],
    average: str,
    tokenizer: Any = None,
) -> PreparedBase:
    """The base of a new classifier.

    Args:
        base_model: already loaded, or None. source: where it comes from.
        dtype: what a base loaded here will run in. options: `device_map` and so on.
        prompts, average, tokenizer: see `make_base_classifier`.

    Raises:
        BaseModelError: no base that can be used.
    """
    if base_model is not None:
        family_of(base_model)
        check_weights(base_model, source.name)
        base, target = base_model.eval().requires_grad_(False), base_model.dtype
        source = replace(source, revision=getattr(base_model.config, "_commit_hash", None) or source.commit())
    else:
        base, commit, target = load_base_fp32(source, dtype, options)
        source = replace(source, revision=commit)
    table, now = make_base_classifier(base, source, prompts, average, tokenizer)
    if base_model is None:
        write_table(cached_table_path(source, prompts, average), table)
        if base.dtype != target:
            base.to(target)
    return PreparedBase(base, table, now, source)


def make_base_classifier(
    base: PreTrainedModel,
    source: BaseSource | None,
    prompts: Sequence[Sequence[str]],
    average: str = "raw",
    tokenizer: Any = None,
) -> tuple[Tensor, dict[str, Any]]:
    """`t` [K, D] of a base in whatever dtype, made in fp32, and its fingerprint.

    Args:
        base: loaded. source: where it came from; its tokenizer and, for a rounded base, its weights are read there.
        tokenizer: read from `source` when None.

    Raises:
        ConfigurationError: no tokenizer and no source, or the same tokens for all prompts.
        BaseModelError: tokenizer or text tower give nothing useful.
    """
    if tokenizer is None:
        if source is None or not source.name:
            raise ConfigurationError("The base model has no name to find its tokenizer by: pass tokenizer=.")
        tokenizer = load_tokenizer(source)
    tokens = _checked_tokens(base, tokenizer, prompts)
    exact, dtype = unrounded_text_side(base, source)
    table = base_embeddings(exact, tokenizer, prompts, average)
    image = image_sketch(exact.state_dict(), dtype)
    return table, fingerprint(table, prompts, average, image, score_parameters(exact), dtype, tokens)


def _checked_tokens(base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[str]]) -> str:
    """A digest of the prompts' tokens, after checking that they tell classes apart."""
    flat = [prompt for group in prompts for prompt in group]
    limit = text_length(base, tokenizer)
    ids = tokenizer(flat, truncation=True, max_length=limit)["input_ids"]
    whole = [number for number, row in enumerate(ids) if len(row) < limit]
    check_tokens(base, [flat[number] for number in whole], [ids[number] for number in whole])
    if len(set(flat)) > 1 and len({tuple(row) for row in ids}) == 1:
        cut = "" if whole else f" once cut to the {limit} that the text tower reads"
        raise ConfigurationError(
            f"All prompts become the same tokens{cut}, so that no class can be told from another: {flat[0]!r:.80} and "
            f"{flat[-1]!r:.80}. Give class names, templates or prompt_names= that differ to the base's tokenizer."
        )
    rows, start = [], 0
    for group in prompts:
        rows.append(tuple(tuple(row) for row in ids[start : start + len(group)]))
        start += len(group)
    warn_of_equals([group[0] for group in prompts], rows, "classes' prompts")
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def base_for_artifact(
    config: Any,
    source: BaseSource,
    shared: PreTrainedModel | None,
    dtype: Any,
    options: Mapping[str, Any],
    *,
    text_tower: bool = False,
    accept_mismatch: bool = False,
) -> PreparedBase:
    """The base of an artifact and its base classifier, the very ones that the residual was trained on.

    Args:
        config: a `TaskResConfig`. source: where to load the base from.
        shared: a base already loaded, or None.
        dtype: what a base loaded here will run in. options: `device_map` and so on.
        text_tower: load it too; otherwise it is left out where `t` is known on this machine.
        accept_mismatch: no check, except that the sizes fit.

    Raises:
        BaseMismatchError: another base. BaseModelError: it cannot be loaded.
    """
    prompts, average, stored = config.class_prompts(), config.prompt_average, config.base_fingerprint or {}
    kept = cached_table_path(source, prompts, average)
    table = read_table(kept)
    if table is not None and not _fits(fingerprint(table, prompts, average), stored):
        table = None
    base, target = shared, None
    if shared is None:
        light = None
        if table is not None and not text_tower and not set(options) - {"attn_implementation"}:
            light = load_image_tower(source, torch_dtype(dtype), options.get("attn_implementation"))
        if light is not None and table is not None:
            now = fingerprint(table, prompts, average, light.sketch, light.score)
            if not accept_mismatch:
                check_fingerprint(now, stored, source.name)
            return PreparedBase(light.base, table, now, source)
        base, commit, target = load_base_fp32(source, dtype, options)
        source = replace(source, revision=commit)
    assert base is not None
    if has_text_tower(base) or table is None:
        if not has_text_tower(base):
            check_same_base(base, config)
        table, now = make_base_classifier(base.eval().requires_grad_(False), source, prompts, average)
    else:
        check_same_base(base, config)
        now = fingerprint(table, prompts, average, score=score_parameters(base))
    if shared is not None:  # its image tower is the one that classifies
        check_weights(shared, source.name)
        now["image"] = image_sketch(shared.state_dict(), str(shared.dtype).removeprefix("torch."))
    if not accept_mismatch:
        check_fingerprint(now, stored, source.name)
    elif table.shape[1] != config.projection_dim:
        raise ArtifactError(
            f"The residual is for embeddings of length {config.projection_dim}, the base {source.name!r} gives "
            f"{table.shape[1]}: they can never fit. Choose a base with the same embedding size."
        )
    if shared is None:
        write_table(kept, table)
        if target is not None and base.dtype != target:
            base.to(target)  # type: ignore[arg-type]
    return PreparedBase(base, table, now, source)


def _fits(now: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    try:
        check_fingerprint(now, stored, "")
    except BaseMismatchError:
        return False
    return True


def cached_table_path(source: BaseSource, prompts: Sequence[Sequence[str]], average: str) -> Path | None:
    """Where `t` for these prompts and this base is kept; None when the base's version cannot be told without loading.

    A Hub base is told by its commit, a folder by the sizes and times of its files. What is read from there is still
    held against the artifact's fingerprint.
    """
    if os.path.isdir(source.name):
        folder = Path(source.name)
        files = [file for pattern in ("*.json", "*.txt", "*.safetensors") for file in sorted(folder.glob(pattern))]
        version: list[Any] = [os.path.realpath(source.name)]
        version += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    elif source.revision is not None:
        version = [source.name, source.revision]
    else:
        return None
    digest = hashlib.sha256(json.dumps([version, prompts_digest(prompts, average)]).encode()).hexdigest()
    return cache_root() / "base_classifiers" / f"{digest[:32]}.safetensors"


def read_table(path: Path | None) -> Tensor | None:
    """A kept `t` [K, D], or None."""
    if path is None or not path.is_file():
        return None
    with suppress(ArtifactError, KeyError):
        return read_tensors(path)[0]["base"]
    return None


def write_table(path: Path | None, table: Tensor) -> None:
    """Keep `t`; a cache folder that cannot be written only costs time later."""
    if path is not None:
        with suppress(ArtifactError):
            write_tensors(path, {"base": table})
