"""From prompts to the base classifier `t` [K, D]: made in fp32, cached, and held against a residual's fingerprint.

A fingerprint holds digests of the prompts, a sketch of `t` and one of the image tower's weights. Sketches are random
projections, compared with a tolerance: rounding differs between machines and dtypes, another checkpoint differs much
more.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .base_model import (
    advise_on_dtype,
    check_same_base,
    check_tokens,
    check_weights,
    has_text_tower,
    image_settings,
    load_base_fp32,
    load_image_tower,
    torch_dtype,
    unrounded_text_side,
)
from .encoders import BaseSource, encode_texts, family_of, load_tokenizer, score_parameters, text_length
from .errors import ArtifactError, BaseMismatchError, BaseModelError, ConfigurationError
from .prompts import prompts_digest, warn_of_equals
from .storage import cache_root, read_tensors, warn_not_kept, write_tensors

_SKETCHES = 8
# Of t's sketch, relative to its norm, by the coarsest dtype of its text tower: above rounding, far below other weights.
_TOLERANCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
_COARSEST = 2e-2
# Of an image side's sketch, likewise.
_IMAGE_TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
_BLOCKS, _BLOCK = 8, 8  # elements looked at in each weight: few, near each other, so that a mapped file is hardly read
_SMALL = 1e-4  # weights below are compared absolutely: fp16 has no finer ones
_ACCEPT = "Pass accept_base_mismatch=True to from_pretrained if you want the residual on this base all the same."
_OTHER_PROMPTS = (
    "The class names, their order or the templates in config.json are not those the residual was trained with, so its "
    "rows would meet other classes. Restore config.json."
)
_SAME_BASE = ("base_model_name_or_path", "base_model_revision", "base_model_subfolder", "projection_dim")
_NO_IMAGE_SIDE = ("text_", "logit_", "temperature")


def fingerprint(
    table: Tensor,
    prompts: Sequence[Sequence[str]],
    average: str,
    image: Mapping[str, Any] | None = None,
    score: tuple[float, float] | None = None,
    dtype: str = "float32",
    tokens: str | None = None,
) -> dict[str, Any]:
    """What a base classifier was made from, small enough for a config.

    Args:
        table: `t` [K, D]. prompts, average: what it was made of.
        image: `image_sketch` of the base, or None where it is not known.
        score: the base's logit scale and bias.
        dtype: what the text tower's weights were rounded to. tokens: `tokens_digest` of the prompts.
    """
    exact = table.double()
    norm = exact.norm()
    if not norm:  # an image tower without a head: no row to tell it by, see `vision`
        exact, norm = torch.ones_like(exact), exact.new_tensor(math.sqrt(exact.numel()))
    return {
        "prompts_sha256": prompts_digest(prompts, average),
        "tokens_sha256": tokens,
        "shape": list(table.shape),
        "norm": round(float(norm), 4),
        "sketch": [round(value, 5) for value in (_projections(exact) / norm.clamp_min(1e-12)).tolist()],
        "dtype": dtype,
        "score": None if score is None else list(score),
        "image": None if image is None else dict(image),
    }


def image_sketch(weights: Mapping[str, Tensor], dtype: str = "float32", config: Any = None) -> dict[str, Any] | None:
    """Random projections of the image tower's weights: 64 elements of each, in units of their root mean square.

    Args:
        weights: by name, as in `state_dict`; those of the text side and the logit's scale are left out.
        dtype: what they were rounded to after they were stored. config: the base's, of what has no weight.

    Returns:
        `{"sketch", "weights", "dtype", "settings"}`; None where weights are quantized, offloaded or not finite.
    """
    samples: dict[int, dict[str, Tensor]] = {}  # by their length, to be handled at once
    for name, weight in sorted(weights.items()):
        if name.startswith(_NO_IMAGE_SIDE) or name.endswith("position_ids"):
            continue
        if weight.dtype == torch.int64:  # a counter, as of batch norm
            continue
        if weight.is_meta or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            return None
        places = _places(weight.numel()).to(weight.device)
        samples.setdefault(len(places), {})[name] = weight.detach().reshape(-1).index_select(0, places).cpu()
    totals = torch.zeros(_SKETCHES, dtype=torch.float64)
    for length, group in samples.items():
        values = torch.stack(list(group.values())).double()
        scales = values.square().mean(1).sqrt().clamp_min(_SMALL)
        directions = torch.stack([_directions(name, length + 1) for name in group])
        totals += torch.einsum("nsl,nl->s", directions[..., :-1], values / (scales * math.sqrt(length))[:, None])
        totals += scales.log() @ directions[..., -1]
    count = sum(map(len, samples.values()))
    sketch = [round(value, 6) for value in (totals / math.sqrt(max(1, count))).tolist()]
    found = {"sketch": sketch, "weights": count, "dtype": dtype, "settings": image_settings(config)}
    return found if count and all(map(math.isfinite, sketch)) else None


@lru_cache(maxsize=1024)
def _places(count: int) -> Tensor:
    """Which of so many elements are looked at."""
    last = max(count - _BLOCK, 0)
    starts = torch.tensor(sorted({last * block // (_BLOCKS - 1) for block in range(_BLOCKS)}))
    return (starts[:, None] + torch.arange(min(_BLOCK, count))).flatten()


@lru_cache(maxsize=1024)  # as many weights as any tower has; kilobytes each
def _directions(name: str, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(_SKETCHES, length, generator=generator, dtype=torch.float64)


def same_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two fingerprints speak of one base, as far as both know it, under the same prompts; but for rounding."""
    return _difference(first, second) is None


def check_fingerprint(now: Mapping[str, Any], stored: Mapping[str, Any], name: str) -> None:
    """Compare a base with the one the residual was trained on.

    Args:
        now, stored: fingerprints. name: the base's, for the message.

    Raises:
        BaseMismatchError: says whether the shape, the prompts (class order, names, templates), the text side (weights
            or tokenizer) or the image tower differ.
    """
    reason = _difference(now, stored)
    if reason is not None:
        raise BaseMismatchError(f"{reason.format(name=repr(name))} {'' if 'shape' in reason else _ACCEPT}".rstrip())


def _difference(now: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """In what two fingerprints differ, as a sentence about `{name}`; None where they do not."""
    if list(now.get("shape") or []) != list(stored.get("shape") or []):
        return (
            f"The base {{name}} gives a base classifier of shape {now.get('shape')}; the residual was trained on "
            f"{stored.get('shape')}. Load it on the base model it was made for (base_model=, base_revision=)."
        )
    if now.get("prompts_sha256") != stored.get("prompts_sha256"):
        return _OTHER_PROMPTS
    gap, allowed = text_gap(now, stored), text_tolerance(now, stored)
    if gap > allowed:
        tokens = (now.get("tokens_sha256"), stored.get("tokens_sha256"))
        cause = "its text tower's weights differ, as in another revision"
        if all(tokens) and tokens[0] != tokens[1]:
            cause = "its tokenizer makes other tokens of the prompts"
        elif not all(tokens):
            cause = "it is another revision, or its text tower's weights or tokenizer changed"
        return (
            f"The base {{name}} no longer gives the text embeddings the residual was trained on (relative difference "
            f"{gap:.2g}, allowed {allowed:g}): {cause}. Pin the right one with base_revision= or base_model=."
        )
    score, expected = now.get("score"), stored.get("score")
    if score and expected and any(abs(a - b) > 0.05 * abs(b) + 1e-6 for a, b in zip(score, expected, strict=False)):
        return (
            f"The base {{name}} has the logit scale and bias {list(score)}, the residual was trained with {expected}: "
            "it is another revision. Pin the right one with base_revision= or base_model=."
        )
    if image_sides_differ(now.get("image"), stored.get("image")):
        return (
            "The image tower of the base {name} is not the one the residual was trained on: its weights differ, as in "
            "another revision or a tower that was trained further, or its settings in config.json do (the text side is "
            "the same). Pin the right one with base_revision= or base_model=."
        )
    return None


def image_sides_differ(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Whether two `image_sketch`es are of different weights or settings; False where one is not known."""
    if not first or not second:
        return False
    sketches = first.get("sketch") or [], second.get("sketch") or []
    settings = first.get("settings") or {}, second.get("settings") or {}
    if any(settings[0][key] != settings[1][key] for key in settings[0].keys() & settings[1].keys()):
        return True
    if first.get("weights") != second.get("weights") or len(sketches[0]) != len(sketches[1]):
        return True
    allowed = max(_IMAGE_TOLERANCE.get(str(side.get("dtype")), _COARSEST) for side in (first, second))
    return any(abs(one - other) > allowed for one, other in zip(*sketches, strict=True))


def check_same_bases(ours: Any, theirs: Any) -> None:
    """Refuse to serve two classifiers over one base if they were made for different ones.

    Args:
        ours, theirs: their `TaskResConfig`s.

    Raises:
        ConfigurationError: in name, commit, length of an embedding or the image tower's weights.
    """
    for name in (*_SAME_BASE, "text_encoding"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ConfigurationError(
                f"The classifiers have different bases: {name} is {getattr(ours, name)!r} here and "
                f"{getattr(theirs, name)!r} there."
            )
    kinds = [getattr(config, "base_classifier", None) for config in (ours, theirs)]
    if kinds[0] != kinds[1]:
        rows = {"head": "the rows of the pretrained head", "class_means": "class means"}
        told = [rows.get(str(kind), "text") for kind in kinds]
        raise ConfigurationError(
            f"The classifiers are made on different base classifiers: {told[0]} here and {told[1]} there. "
            "Make both on the same (base_classifier=), or load the other by itself."
        )
    if image_sides_differ(*((config.base_fingerprint or {}).get("image") for config in (ours, theirs))):
        raise ConfigurationError(
            "The classifiers have different bases: the weights of their image towers differ, though not their names."
        )


def text_tolerance(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """How far two text sides may differ by rounding alone, by the dtypes of their towers."""
    return max(_TOLERANCE.get(str(side.get("dtype", "float32")), _COARSEST) for side in (first, second))


def text_gap(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    """Largest relative difference of two text sides: sketches and norms."""
    sketches = first.get("sketch") or [], second.get("sketch") or []
    norms = [float(side.get("norm") or 0.0) for side in (first, second)]
    if len(sketches[0]) != len(sketches[1]) or not sketches[0] or not all(norms):
        return math.inf
    gap = max(abs(one - other) for one, other in zip(*sketches, strict=True))
    return float(max(gap, abs(norms[0] / norms[1] - 1.0)))


def _projections(table: Tensor) -> Tensor:
    """`u_i . t . v_i` for fixed random unit-variance u and v: moves when any row moves or rows swap."""
    generator = torch.Generator().manual_seed(20221121)
    left, right = (torch.randn(_SKETCHES, size, generator=generator, dtype=torch.float64) for size in table.shape)
    return ((left @ table) * right).sum(1)


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
        BaseModelError: the text tower gives NaN, or the same for all classes.
    """
    if average not in ("raw", "normalized"):
        raise ConfigurationError(f"`prompt_average` must be 'raw' or 'normalized'; got {average!r}.")
    flat = [prompt for group in prompts for prompt in group]
    embeddings = encode_texts(base, tokenizer, flat)
    groups = embeddings.split([len(group) for group in prompts])
    if average == "normalized":  # a row of the mean direction and the mean length
        directions = [F.normalize(F.normalize(group, dim=-1).mean(0, True), dim=-1) for group in groups]
        groups = [row * group.norm(dim=-1).mean() for row, group in zip(directions, groups, strict=True)]
    table = torch.stack([group.mean(dim=0) for group in groups])
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
    advise_on_dtype(base)
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
    tokens = checked_tokens(base, tokenizer, prompts)
    exact, dtype = unrounded_text_side(base, source)
    table = base_embeddings(exact, tokenizer, prompts, average)
    image = image_sketch(exact.state_dict(), dtype, exact.config)
    return table, fingerprint(table, prompts, average, image, score_parameters(exact), dtype, tokens)


def checked_tokens(base: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[str]]) -> str:
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
    if not accept_mismatch and prompts_digest(prompts, average) != stored.get("prompts_sha256"):
        raise BaseMismatchError(f"{_OTHER_PROMPTS} {_ACCEPT}")  # before thousands of prompts are embedded
    kept = cached_table_path(source, prompts, average)
    table, known = read_table(kept), dict[str, Any]()
    if table is not None and not same_base(known := fingerprint(table, prompts, average), stored):
        table = None
    base, target = shared, None
    if shared is None:
        light = None
        if table is not None and not text_tower and not set(options) - {"attn_implementation"}:
            light = load_image_tower(source, torch_dtype(dtype), options.get("attn_implementation"))
        if light is not None and table is not None:
            now = {**known, "score": list(light.score), "image": image_sketch(light.weights, config=light.base.config)}
            if not accept_mismatch:
                check_fingerprint(now, stored, source.name)
            advise_on_dtype(light.base)
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
        now = {**known, "score": list(score_parameters(base))}
    if shared is not None:  # its image tower is the one that classifies
        check_weights(shared, source.name)
        now["image"] = image_sketch(shared.state_dict(), str(shared.dtype).removeprefix("torch."), shared.config)
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
    advise_on_dtype(base)
    return PreparedBase(base, table, now, source)


def cached_table_path(source: BaseSource, prompts: Sequence[Sequence[str]], average: str) -> Path | None:
    """Where `t` for these prompts and this base is kept; None when the base's version cannot be told without loading.

    A Hub base is told by its commit, a folder by its files' sizes and times; an artifact's fingerprint still decides.
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
    """A kept `t` [K, D], or None; a warning where the file is damaged."""
    if path is None or not path.is_file():
        return None
    try:
        tensors, metadata = read_tensors(path)
        table = tensors.get("base")
        if table is None or table.dtype != torch.float32 or table.dim() != 2 or metadata.get("of") != path.stem:
            raise ArtifactError("it holds another table")
        return table
    except ArtifactError as error:
        warnings.warn(f"The base classifier kept in {path} cannot be used ({error}) and is made again.", stacklevel=3)
        return None


def write_table(path: Path | None, table: Tensor) -> None:
    """Keep `t`; a cache folder that cannot be written only costs time later."""
    if path is not None:
        try:
            write_tensors(path, {"base": table}, {"of": path.stem})
        except ArtifactError as error:
            warn_not_kept(path.parent, "The base classifier is", error)
